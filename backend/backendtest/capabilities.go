package backendtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"

	"github.com/memferry/memferry"
)

func (s *suite) testCapabilities() {
	again := memferry.CapabilitiesOf(s.b)
	if again != s.caps {
		s.Errorf("capabilities were %+v, are %+v", s.caps, again)
	}
	z := s.caps.BlockSizes
	if z.Min < 0 || z.Min&(z.Min-1) != 0 || z.Preferred < 0 || z.Max < 0 || (z.Max > 0 && z.Max < z.Min) {
		s.Errorf("block sizes %+v", z)
	}
}

// ranges are what trims and zeroes are tried on: within pages, whole pages,
// chunks, and at the end.
func (s *suite) ranges() [][2]int64 {
	end := s.align(min(s.size, maxChecked))
	var r [][2]int64
	for _, c := range [][2]int64{{0, 0}, {5, 10}, {4096, 8192}, {100, 20_000}, {0, 65536}, {end - 10_000, 10_000}, {end - s.block, s.block}, {0, end}} {
		off, n := s.align(c[0]), s.align(c[1])
		if c[0]+c[1] == end {
			n = end - off
		}
		r = append(r, [2]int64{off, n})
	}
	return r
}

func (s *suite) expectRange(what string, call func(off, n int64) error) {
	s.Helper()
	for _, r := range [][2]int64{{-s.block, s.block}, {s.size, s.block}, {s.size - s.block, 2 * s.block}, {0, -s.block}, {s.align(math.MaxInt64 - s.block), 2 * s.block}} {
		s.expectError(what, call(r[0], r[1]), memferry.ErrOutOfRange)
	}
}

func (s *suite) testTrim() {
	t := s.caps.Trimmer
	s.expectRange("trim out of range", t.Trim)
	for _, r := range s.ranges() {
		before := s.random(s.align(min(s.size, maxChecked)))
		s.write(0, before)
		if err := t.Trim(r[0], r[1]); err != nil {
			s.Fatalf("trim of %d bytes at %d: %v", r[1], r[0], err)
		}
		after := s.read(0, int64(len(before)))
		s.checkTrimmed(before, after, r[0], r[1])
		s.expect("after another read", 0, after)
	}
}

// checkTrimmed checks that bytes in the range are as before or zero, and those
// outside as before.
func (s *suite) checkTrimmed(before, after []byte, off, n int64) {
	s.Helper()
	for i, c := range after {
		in := off <= int64(i) && int64(i) < off+n
		if c != before[i] && (!in || c != 0) {
			s.Fatalf("after a trim of %d bytes at %d, the byte at %d is %#x; was %#x", n, off, i, c, before[i])
		}
	}
}

func (s *suite) testWriteZeroes() {
	z := s.caps.ZeroWriter
	s.expectRange("write zeroes out of range", func(off, n int64) error { return z.WriteZeroes(off, n, 0) })
	for flags := range memferry.ZeroFlags(4) {
		for _, r := range s.ranges() {
			model := s.random(s.align(min(s.size, maxChecked)))
			s.write(0, model)
			err := z.WriteZeroes(r[0], r[1], flags)
			switch {
			case flags&memferry.ZeroFast != 0 && errors.Is(err, memferry.ErrNotSupported):
				s.expect("after fast zeroes were refused", 0, model)
				continue
			case err != nil:
				s.Fatalf("zeroes of %d bytes at %d, flags %d: %v", r[1], r[0], flags, err)
			}
			clear(model[r[0] : r[0]+r[1]])
			s.expect("after zeroes", 0, model)
		}
	}
}

// extents returns those of a whole range, checked for form.
func (s *suite) extents(off, n int64) []memferry.Extent {
	s.Helper()
	var all []memferry.Extent
	for end := off + n; off < end; {
		part, err := s.caps.Extenter.Extents(s.Context(), off, end-off)
		if err != nil {
			s.Fatalf("extents of %d bytes at %d: %v", end-off, off, err)
		}
		if len(part) == 0 || len(part) > memferry.MaxExtents {
			s.Fatalf("extents of %d bytes at %d: %d of them", end-off, off, len(part))
		}
		for _, e := range part {
			if e.Off != off || e.Len <= 0 || e.Len > end-off {
				s.Fatalf("extent %+v where one from %d to at most %d must come", e, off, end)
			}
			off += e.Len
		}
		all = append(all, part...)
	}
	return all
}

func (s *suite) testExtents() {
	call := func(off, n int64) error {
		_, err := s.caps.Extenter.Extents(s.Context(), off, n)
		return err
	}
	s.expectRange("extents out of range", call)
	if call(0, 0) == nil {
		s.Error("extents of nothing: no error")
	}
	s.checkExtents()
	if s.caps.ReadOnly {
		return
	}
	for i := range int64(8) {
		s.write(s.align(i*s.size/9), s.random(s.block))
	}
	s.checkExtents()
	if s.caps.ZeroWriter != nil {
		if err := s.caps.ZeroWriter.WriteZeroes(0, s.align(s.size/2), 0); err != nil {
			s.Fatal(err)
		}
		s.checkExtents()
	}
}

// checkExtents checks that what is said to be zero is. (A hole need not be:
// NBD has such holes.)
func (s *suite) checkExtents() {
	s.Helper()
	n := s.align(min(s.size, maxChecked))
	for _, start := range []int64{0, s.block, s.size - n} {
		for _, e := range s.extents(start, n-start%n) {
			if e.Flags&memferry.ExtentZero != 0 {
				s.expect("extent of zeroes", e.Off, make([]byte, e.Len))
			}
		}
	}
}

func (s *suite) generation() string {
	s.Helper()
	g, err := s.caps.Generationer.Generation(s.Context())
	if err != nil {
		s.Fatalf("generation: %v", err)
	}
	return g
}

func (s *suite) testGeneration() {
	before := s.generation()
	if before == "" {
		return // unknown
	}
	_ = s.read(0, s.block)
	if g := s.generation(); g != before {
		s.Errorf("a read changed the generation from %q to %q", before, g)
	}
	if s.caps.ReadOnly {
		return
	}
	seen := map[string]bool{before: true}
	changed := func(what string) {
		s.Helper()
		g := s.generation()
		if seen[g] {
			s.Errorf("%s: generation %q again", what, g)
		}
		seen[g] = true
	}
	for range 3 {
		s.write(0, s.random(s.align(10_000)))
		changed("write")
	}
	if s.caps.ZeroWriter != nil {
		if err := s.caps.ZeroWriter.WriteZeroes(0, s.align(8192), 0); err != nil {
			s.Fatal(err)
		}
		changed("write zeroes")
	}
	if s.caps.Trimmer != nil {
		s.write(0, s.random(s.align(8192)))
		changed("write")
		before := s.read(0, s.align(8192))
		if err := s.caps.Trimmer.Trim(0, s.align(8192)); err != nil {
			s.Fatal(err)
		}
		if !bytes.Equal(before, s.read(0, s.align(8192))) {
			changed("trim")
		}
	}
	if s.caps.Viewer != nil {
		v, err := s.caps.Viewer.ViewForWrite(0, s.block)
		if err != nil {
			s.Fatal(err)
		}
		v[0]++
		s.caps.Viewer.ReleaseView()
		changed("view for writing")
	}
	if err := s.b.Sync(); err != nil {
		s.Error(err)
	}
}

func (s *suite) testReadBatch() {
	n := s.align(minSize)
	want := s.read(0, n)
	ops := []memferry.ReadOp{
		{Off: 0, P: make([]byte, s.block)},
		{Off: s.align(5000), P: make([]byte, s.align(9000))},
		{Off: s.size - s.block, P: make([]byte, 2*s.block)},
		{Off: -s.block, P: make([]byte, s.block)},
	}
	if err := s.caps.BatchReader.ReadBatch(s.Context(), ops); err != nil {
		s.Fatal(err)
	}
	for _, op := range ops[:2] {
		if op.Err != nil || op.N != len(op.P) || !bytes.Equal(op.P, want[op.Off:][:op.N]) {
			s.Errorf("at %d: %d, %v, or wrong bytes", op.Off, op.N, op.Err)
		}
	}
	if ops[2].N != int(s.block) || !errors.Is(ops[2].Err, io.EOF) {
		s.Errorf("at the end: %d, %v", ops[2].N, ops[2].Err)
	}
	s.expectError("at a negative offset", ops[3].Err, memferry.ErrOutOfRange)
	if err := s.caps.BatchReader.ReadBatch(s.Context(), nil); err != nil {
		s.Errorf("empty batch: %v", err)
	}
}

func (s *suite) testReadAtContext() {
	want := s.read(0, s.align(10_000))
	got := make([]byte, len(want))
	if n, err := s.caps.ContextReader.ReadAtContext(s.Context(), got, 0); n != len(got) || err != nil || !bytes.Equal(got, want) {
		s.Errorf("%d, %v, or wrong bytes", n, err)
	}
	if n, err := s.caps.ContextReader.ReadAtContext(s.Context(), got[:2*s.block], s.size-s.block); int64(n) != s.block || !errors.Is(err, io.EOF) {
		s.Errorf("at the end: %d, %v", n, err)
	}
	ctx, cancel := context.WithCancel(s.Context())
	cancel()
	_, err := s.caps.ContextReader.ReadAtContext(ctx, got, 0)
	s.expectError("read with a context that is done", err, context.Canceled)
	s.expect("after an abandoned read", 0, want)
}

func (s *suite) testWriteAtContext() {
	p := s.random(s.align(10_000))
	if n, err := s.caps.ContextWriter.WriteAtContext(s.Context(), p, s.block); n != len(p) || err != nil {
		s.Errorf("%d, %v", n, err)
	}
	s.expect("written bytes", s.block, p)
	_, err := s.caps.ContextWriter.WriteAtContext(s.Context(), p, s.size-s.block)
	s.expectError("write out of range", err, memferry.ErrOutOfRange)
	ctx, cancel := context.WithCancel(s.Context())
	cancel()
	_, err = s.caps.ContextWriter.WriteAtContext(ctx, p, 0)
	s.expectError("write with a context that is done", err, context.Canceled)
	s.write(0, p)
	s.expect("after an abandoned write", 0, p)
}

func (s *suite) testReadStream() {
	n := s.align(min(s.size, 1<<20))
	if !s.caps.ReadOnly {
		s.write(0, s.random(n/2/s.block*s.block))
	}
	want := s.read(0, n)
	got := bytes.Repeat([]byte{0xdb}, int(n))
	covered := int64(0)
	err := s.caps.StreamReader.ReadStream(s.Context(), 0, n, func(off, n int64, p []byte) error {
		if p != nil && int64(len(p)) != n {
			s.Errorf("piece of %d with %d bytes", n, len(p))
		}
		covered += n
		if p == nil {
			clear(got[off : off+n])
		}
		copy(got[off:], p)
		return nil
	})
	if err != nil || covered != n || !bytes.Equal(got, want) {
		s.Errorf("error %v, %d of %d bytes, first difference at %d", err, covered, n, firstDifference(got, want))
	}
	enough := errors.New("enough")
	err = s.caps.StreamReader.ReadStream(s.Context(), 0, n, func(int64, int64, []byte) error { return enough })
	s.expectError("stream whose sink fails", err, enough)
	s.expect("after an ended stream", 0, want)
}

func (s *suite) testView() {
	v := s.caps.Viewer
	n := s.align(10_000)
	if !s.caps.ReadOnly {
		w, err := v.ViewForWrite(s.block, n)
		if err != nil {
			s.Fatal(err)
		}
		p := s.random(n)
		if int64(len(w)) != n {
			s.Fatalf("a view of %d bytes has %d", n, len(w))
		}
		copy(w, p)
		v.ReleaseView()
		s.expect("stored through a view", s.block, p)
	}
	r, err := v.View(s.block, n)
	if err != nil {
		s.Fatal(err)
	}
	if int64(len(r)) != n || !bytes.Equal(r, s.read(s.block, n)) {
		s.Error("a view shows other bytes than a read")
	}
	if !s.caps.ReadOnly {
		p := s.random(s.block)
		s.write(s.block, p)
		if !bytes.Equal(r[:s.block], p) {
			s.Error("a write does not show in a view")
		}
	}
	v.ReleaseView()
	s.expectRange("view out of range", func(off, n int64) error {
		_, err := v.View(off, n)
		return err
	})
}

func (s *suite) testFile() {
	f := s.caps.Filer.File()
	if f == nil {
		s.Fatal("no file")
	}
	n := s.align(10_000)
	if !s.caps.ReadOnly {
		s.write(s.block, s.random(n))
	}
	got := make([]byte, n)
	if _, err := f.ReadAt(got, s.block); err != nil {
		s.Fatal(err)
	}
	s.expect("what the file holds", s.block, got)
}
