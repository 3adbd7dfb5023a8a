package backendtest

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/memferry/memferry"
)

// modelSize is how much of the backend the model uses, at its start and at its
// end.
const modelSize = 256 << 10

// model compares a backend with a slice.
type model struct {
	*suite
	base int64 // where in the backend the slice starts
	want []byte
}

// testModel performs random operations. On failure, rapid prints how to repeat
// them.
func testModel(t *testing.T, open Open, o Options) {
	rapid.Check(t, func(rt *rapid.T) {
		s := wrap(t, open(t), o)
		defer s.b.Close()
		m := &model{suite: s}
		n := s.align(min(s.size, modelSize))
		if rapid.Bool().Draw(rt, "at the end") {
			m.base = s.size - n
		}
		m.want = make([]byte, n)
		if _, err := s.b.ReadAt(m.want, m.base); err != nil {
			rt.Fatalf("read: %v", err)
		}
		steps := max(1, o.Steps)
		if o.Steps == 0 {
			steps = 30
		}
		for range rapid.IntRange(1, 2*steps).Draw(rt, "steps") {
			m.step(rt)
		}
		m.check(rt, 0, n)
	})
}

func (m *model) step(rt *rapid.T) {
	off, n := m.someRange(rt)
	switch rapid.SampledFrom([]string{"read", "read", "write", "write", "write", "trim", "zeroes", "sync", "extents"}).Draw(rt, "op") {
	case "read":
		m.check(rt, off, n)
	case "write":
		if !m.caps.ReadOnly {
			m.stepWrite(rt, off, n)
		}
	case "trim":
		if m.caps.Trimmer != nil {
			m.stepTrim(rt, off, n)
		}
	case "zeroes":
		if m.caps.ZeroWriter != nil {
			m.stepZeroes(rt, off, n)
		}
	case "sync":
		if err := m.b.Sync(); err != nil {
			rt.Fatalf("sync: %v", err)
		}
	case "extents":
		if m.caps.Extenter != nil && n > 0 {
			m.stepExtents(rt, off, n)
		}
	}
}

// someRange draws a range in the slice, with a liking for the borders of pages
// and chunks.
func (m *model) someRange(rt *rapid.T) (off, n int64) {
	size := int64(len(m.want))
	point := func(label string) int64 {
		p := rapid.Int64Range(0, size).Draw(rt, label)
		if unit := rapid.SampledFrom([]int64{1, 1, 512, 4096, 65536}).Draw(rt, "unit"); unit > 1 {
			p = p / unit * unit
		}
		return m.align(p)
	}
	a, b := point("from"), point("to")
	return min(a, b), max(a, b) - min(a, b)
}

func (m *model) check(rt *rapid.T, off, n int64) {
	got := bytes.Repeat([]byte{0xdb}, int(n))
	if k, err := m.b.ReadAt(got, m.base+off); int64(k) != n || err != nil {
		rt.Fatalf("read of %d bytes at %d: %d, %v", n, m.base+off, k, err)
	}
	if i := firstDifference(got, m.want[off:off+n]); i >= 0 {
		rt.Fatalf("read of %d bytes at %d: the byte at %d is %#x, want %#x", n, m.base+off, m.base+off+int64(i), got[i], m.want[off+int64(i)])
	}
}

func (m *model) stepWrite(rt *rapid.T, off, n int64) {
	p := bytes.Repeat([]byte{rapid.Byte().Draw(rt, "byte")}, int(n))
	for i := 0; i < len(p); i += 251 {
		p[i] = byte(i)
	}
	if k, err := m.b.WriteAt(p, m.base+off); int64(k) != n || err != nil {
		rt.Fatalf("write of %d bytes at %d: %d, %v", n, m.base+off, k, err)
	}
	copy(m.want[off:], p)
}

func (m *model) stepTrim(rt *rapid.T, off, n int64) {
	if err := m.caps.Trimmer.Trim(m.base+off, n); err != nil {
		rt.Fatalf("trim of %d bytes at %d: %v", n, m.base+off, err)
	}
	got := make([]byte, n)
	if _, err := m.b.ReadAt(got, m.base+off); err != nil {
		rt.Fatalf("read: %v", err)
	}
	for i, c := range got {
		if c != 0 && c != m.want[off+int64(i)] {
			rt.Fatalf("after a trim of %d bytes at %d, the byte at %d is %#x", n, m.base+off, m.base+off+int64(i), c)
		}
	}
	copy(m.want[off:], got)
}

func (m *model) stepZeroes(rt *rapid.T, off, n int64) {
	flags := memferry.ZeroFlags(rapid.IntRange(0, 3).Draw(rt, "flags"))
	err := m.caps.ZeroWriter.WriteZeroes(m.base+off, n, flags)
	if flags&memferry.ZeroFast != 0 && errors.Is(err, memferry.ErrNotSupported) {
		m.check(rt, off, n)
		return
	}
	if err != nil {
		rt.Fatalf("zeroes of %d bytes at %d, flags %d: %v", n, m.base+off, flags, err)
	}
	clear(m.want[off : off+n])
}

func (m *model) stepExtents(rt *rapid.T, off, n int64) {
	for _, e := range m.extents(m.base+off, n) {
		if e.Flags&memferry.ExtentZero == 0 {
			continue
		}
		for i, c := range m.want[e.Off-m.base:][:e.Len] {
			if c != 0 {
				rt.Fatalf("extent %+v says zero, but the byte at %d is %#x", e, e.Off+int64(i), c)
			}
		}
	}
}
