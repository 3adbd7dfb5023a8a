package size

import (
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want int64
	}{
		{"0", 0},
		{"4096", 4096},
		{"512K", 512 << 10},
		{"512k", 512 << 10},
		{"512KB", 512 << 10},
		{"512KiB", 512 << 10},
		{"512kib", 512 << 10},
		{"1GiB", 1 << 30},
		{"1G", 1 << 30},
		{"1.5G", 3 << 29},
		{"0.5T", 1 << 39},
		{"1.1K", 1126},
		{"256 MiB", 256 << 20},
		{"7E", 7 << 60},
		{"7.999999999999999999999999E", 1<<63 - 2},
		{"12 B", 12},
		{"9223372036854775807", math.MaxInt64},
	} {
		got, err := Parse(tc.in)
		// Eighteen digits of a fraction are exact to about an exbibyte's 1e-18.
		if err != nil || (got != tc.want && !(strings.HasPrefix(tc.in, "7.9") && tc.want-got < 8)) {
			t.Errorf("Parse(%q) = %d, %v; want %d", tc.in, got, err, tc.want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for _, in := range []string{
		"", " ", "K", "-1", "+1", "1.5", "1..5K", "1.K", ".5K", "1.5.5K", "1X", "1KX", "1iB", "1 K B",
		"8E", "9223372036854775808", "99999999999999999999", "1e6", "0x10", "1,5K", strings.Repeat("1", 100),
	} {
		if got, err := Parse(in); err == nil {
			t.Errorf("Parse(%q) = %d, want an error", in, got)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("Parse(%q): error of several lines: %v", in, err)
		}
	}
}

func TestFormat(t *testing.T) {
	for _, tc := range []struct {
		in   int64
		want string
	}{
		{0, "0 B"},
		{1023, "1023 B"},
		{1024, "1 KiB"},
		{256 << 20, "256 MiB"},
		{3 << 29, "1.5 GiB"},
		{1<<30 - 1, "1023.9 MiB"},
		{1 << 40, "1 TiB"},
		{math.MaxInt64, "7.9 EiB"},
		{-1536, "-1.5 KiB"},
		{math.MinInt64, "-8 EiB"},
	} {
		if got := Format(tc.in); got != tc.want {
			t.Errorf("Format(%d) = %q, want %q", tc.in, got, tc.want)
		}
	}
}

// What Format writes, Parse reads, and to within the decimal it shows.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(0, math.MaxInt64).Draw(t, "n")
		n >>= rapid.IntRange(0, 62).Draw(t, "shift")
		s := Format(n)
		got, err := Parse(s)
		if err != nil {
			t.Fatalf("Parse(Format(%d) = %q): %v", n, s, err)
		}
		if got > n || n-got > n/10 {
			t.Fatalf("Parse(Format(%d) = %q) = %d", n, s, got)
		}
	})
}

func TestBytes(t *testing.T) {
	var b Bytes
	if err := b.Set("64K"); err != nil || b != 64<<10 || b.String() != "64 KiB" || b.Type() != "size" {
		t.Errorf("Bytes: %v, %v, %v", err, b, b.Type())
	}
	if err := b.Set("many"); err == nil || b != 64<<10 {
		t.Errorf("Set(many): error %v, value %v", err, b)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"4096", "512K", "1.5GiB", "7.999999999999999999E", "256 MiB", "-1", "1..5K"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := Parse(s)
		if err != nil {
			return
		}
		if n < 0 {
			t.Fatalf("Parse(%q) = %d", s, n)
		}
		if again, err := Parse(Format(n)); err != nil || again > n {
			t.Fatalf("Parse(%q) = %d, then Parse(%q) = %d, %v", s, n, Format(n), again, err)
		}
	})
}
