package cli

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"sort"

	"github.com/cespare/xxhash/v2"
)

// demoBlock is the unit in which the demonstration's data is generated.
const demoBlock = 1 << 20

// demoData is data that can be made again at any time: what a file should
// hold, without a second copy of it. Three blocks of four are noise, as media
// and archives are; the fourth is text.
type demoData struct {
	size   int64
	writes map[int64]demoWrite // by offset; not overlapping
}

// demoWrite is one write of the application: n bytes made from seed.
type demoWrite struct {
	n    int
	seed uint64
}

func (w demoWrite) bytes() []byte {
	p := make([]byte, w.n)
	noise(p, w.seed)
	return p
}

func noise(p []byte, seed uint64) {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	// Its Read never fails.
	_, _ = rand.NewChaCha8(key).Read(p)
}

// fill makes the block at off, writes included.
func (d *demoData) fill(p []byte, off int64) {
	i := off / demoBlock
	if i%4 == 3 {
		n := 0
		for line := 0; n < len(p); line++ {
			n += copy(p[n:], fmt.Sprintf("block %d, line %d: the quick brown fox jumps over the lazy dog\n", i, line))
		}
	} else {
		noise(p, uint64(i)+1)
	}
	for at, w := range d.writes {
		if at+int64(w.n) <= off || at >= off+int64(len(p)) {
			continue
		}
		b := w.bytes()
		if at < off {
			b, at = b[off-at:], off
		}
		copy(p[at-off:], b)
	}
}

// each passes every block to f, in order. The buffer is used again.
func (d *demoData) each(f func(p []byte, off int64) error) error {
	buf := make([]byte, demoBlock)
	for off := int64(0); off < d.size; off += demoBlock {
		p := buf[:min(demoBlock, d.size-off)]
		d.fill(p, off)
		if err := f(p, off); err != nil {
			return err
		}
	}
	return nil
}

// sum is the checksum of the data.
func (d *demoData) sum() uint64 {
	h := xxhash.New()
	_ = d.each(func(p []byte, _ int64) error { _, err := h.Write(p); return err }) // a hash never fails
	return h.Sum64()
}

// sumOf is the checksum of what r holds.
func sumOf(r io.ReaderAt, n int64) (uint64, error) {
	h := xxhash.New()
	if _, err := io.CopyBuffer(h, io.NewSectionReader(r, 0, n), make([]byte, demoBlock)); err != nil {
		return 0, err
	}
	return h.Sum64(), nil
}

// quantile returns the q-th of sorted values.
func quantile[T any](sorted []T, q float64) T {
	var zero T
	if len(sorted) == 0 {
		return zero
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func sortDurations[T ~int64](d []T) []T {
	sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
	return d
}
