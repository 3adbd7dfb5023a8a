// Package size reads and writes numbers of bytes the way people do: 512K,
// 1.5G, 64 MiB. The prefixes K, M, G, T, P and E are powers of 1024, with or
// without the iB or B behind them.
package size

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

const (
	units = "KMGTPE"

	// maxLen bounds what Parse looks at; the longest sensible size is far
	// shorter ("9223372036854775807").
	maxLen = 64
	// maxFraction is how many digits after the point fit an exact uint64.
	maxFraction = 18
)

// Bytes is a number of bytes that can be a command-line flag: it has the
// methods of the flag and pflag Value interfaces.
type Bytes int64

// Set parses s with [Parse].
func (b *Bytes) Set(s string) error {
	n, err := Parse(s)
	if err != nil {
		return err
	}
	*b = Bytes(n)
	return nil
}

// String formats b with [Format].
func (b Bytes) String() string { return Format(int64(b)) }

// Type names the value in usage texts.
func (b Bytes) Type() string { return "size" }

// Parse reads a size: digits, a decimal fraction where a prefix follows, an
// optional space, an optional prefix (K, M, G, T, P, E; powers of 1024) and an
// optional "B" or "iB", in any case. A fraction of a byte is cut off. Negative
// sizes, and sizes above 8 EiB less one byte, are errors.
func Parse(s string) (int64, error) {
	if len(s) > maxLen {
		return 0, fmt.Errorf("size %q…: too long", s[:16])
	}
	number, unit := split(strings.TrimSpace(s))
	shift, ok := shiftOf(unit)
	whole, fraction, point := strings.Cut(number, ".")
	if !ok || whole == "" || (point && (fraction == "" || shift == 0)) || strings.Contains(fraction, ".") {
		return 0, fmt.Errorf("size %q is no number with a unit; write it as 4096, 512K or 1.5GiB", s)
	}
	n, err := strconv.ParseUint(whole, 10, 63)
	if err != nil || n > uint64(1<<63-1)>>shift {
		return 0, fmt.Errorf("size %q: larger than 8 EiB", s)
	}
	// n<<shift has shift zero bits at its end and the fraction is below
	// 1<<shift, so this can't overflow.
	return int64(n<<shift | fractionOf(fraction, shift)), nil
}

// split cuts s where its number ends.
func split(s string) (number, unit string) {
	i := 0
	for i < len(s) && (s[i] == '.' || '0' <= s[i] && s[i] <= '9') {
		i++
	}
	return s[:i], strings.TrimLeft(s[i:], " ")
}

// shiftOf returns the power of two that unit stands for.
func shiftOf(unit string) (uint, bool) {
	u := strings.ToUpper(unit)
	if u == "" || u == "B" {
		return 0, true
	}
	i := strings.IndexByte(units, u[0])
	if i < 0 {
		return 0, false
	}
	if rest := u[1:]; rest != "" && rest != "B" && rest != "IB" {
		return 0, false
	}
	return uint(i+1) * 10, true
}

// fractionOf returns 0.digits times 1<<shift, cut to whole bytes.
func fractionOf(digits string, shift uint) uint64 {
	if len(digits) > maxFraction {
		digits = digits[:maxFraction]
	}
	if digits == "" {
		return 0
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		return 0 // unreachable: split lets digits and points through alone
	}
	scale := uint64(1)
	for range digits {
		scale *= 10
	}
	hi, lo := bits.Mul64(n, 1<<shift)
	q, _ := bits.Div64(hi, lo, scale) // n < scale, so hi < scale
	return q
}

// Format writes n for people: the largest unit that leaves a number of at
// least one, with one decimal where it is not whole ("256 MiB", "1.5 GiB",
// "100 B"). What it writes, Parse reads.
func Format(n int64) string {
	if n < 0 {
		if n == -1<<63 {
			return "-8 EiB"
		}
		return "-" + Format(-n)
	}
	if n < 1<<10 {
		return strconv.FormatInt(n, 10) + " B"
	}
	i := (bits.Len64(uint64(n)) - 1) / 10
	// Tenths, rounded down, so that a number never shows as the next unit.
	one := int64(1) << (10 * i)
	whole, tenths := n/one, tenthsOf(n%one, one)
	if n%one == 0 {
		return fmt.Sprintf("%d %ciB", whole, units[i-1])
	}
	return fmt.Sprintf("%d.%d %ciB", whole, tenths, units[i-1])
}

// tenthsOf returns rest/one in tenths, without overflow for large units.
func tenthsOf(rest, one int64) int64 {
	hi, lo := bits.Mul64(uint64(rest), 10)
	q, _ := bits.Div64(hi, lo, uint64(one))
	return int64(q)
}
