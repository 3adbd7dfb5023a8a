// Package backendtest is the contract of memferry.Backend and its capabilities
// as a test suite. Every backend passes it:
//
//	func TestContract(t *testing.T) {
//		backendtest.Run(t, func(t testing.TB) memferry.Backend { … }, backendtest.Options{})
//	}
package backendtest

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/memferry/memferry"
)

const (
	// minSize is the least size that leaves room for the ranges the tests use,
	// in bytes and in the backend's blocks.
	minSize   = 64 << 10
	minBlocks = 16
	// maxChecked bounds how much of a large backend is read at once.
	maxChecked = 16 << 20
)

// Options adapt the suite to a backend. The zero value suits most.
type Options struct {
	// Filled says that a new backend does not read as zero.
	Filled bool
	// Volatile says that a failed close, a lost connection or the like is a
	// right answer of calls that run while the backend is closed, beside
	// memferry.ErrClosed.
	Volatile bool
	// Steps is how many operations one run of the model has, on average. Zero
	// means rapid's default; fewer suit slow backends.
	Steps int
}

// Open returns a new backend of its own, of the same size each time and at
// least 64 KiB and 16 blocks. The suite closes it.
type Open func(t testing.TB) memferry.Backend

// suite is one test's view of a backend.
type suite struct {
	*testing.T
	b     memferry.Backend
	caps  memferry.Capabilities
	size  int64
	block int64 // what offsets and lengths must be multiples of
	opts  Options
	rand  *rand.Rand
}

// Run checks the backends that open returns against the contract.
func Run(t *testing.T, open Open, o Options) {
	t.Helper()
	for _, test := range []struct {
		name string
		run  func(*suite)
		need func(memferry.Capabilities) bool
	}{
		{"Size", (*suite).testSize, nil},
		{"ReadsZero", (*suite).testReadsZero, nil},
		{"ReadAtEnd", (*suite).testReadAtEnd, nil},
		{"ReadOutOfRange", (*suite).testReadOutOfRange, nil},
		{"WriteRead", (*suite).testWriteRead, writable},
		{"WriteOutOfRange", (*suite).testWriteOutOfRange, nil},
		{"WriteKeepsNothing", (*suite).testWriteKeepsNothing, writable},
		{"ReadOnly", (*suite).testReadOnly, func(c memferry.Capabilities) bool { return c.ReadOnly }},
		{"Sync", (*suite).testSync, nil},
		{"Concurrent", (*suite).testConcurrent, writable},
		{"Overlapping", (*suite).testOverlapping, writable},
		{"Close", (*suite).testClose, nil},
		{"CloseUnderLoad", (*suite).testCloseUnderLoad, nil},
		{"Capabilities", (*suite).testCapabilities, nil},
		{"Trim", (*suite).testTrim, func(c memferry.Capabilities) bool { return c.Trimmer != nil }},
		{"WriteZeroes", (*suite).testWriteZeroes, func(c memferry.Capabilities) bool { return c.ZeroWriter != nil }},
		{"Extents", (*suite).testExtents, func(c memferry.Capabilities) bool { return c.Extenter != nil }},
		{"Generation", (*suite).testGeneration, func(c memferry.Capabilities) bool { return c.Generationer != nil }},
		{"ReadBatch", (*suite).testReadBatch, func(c memferry.Capabilities) bool { return c.BatchReader != nil }},
		{"ReadAtContext", (*suite).testReadAtContext, func(c memferry.Capabilities) bool { return c.ContextReader != nil }},
		{"WriteAtContext", (*suite).testWriteAtContext, func(c memferry.Capabilities) bool { return c.ContextWriter != nil && !c.ReadOnly }},
		{"ReadStream", (*suite).testReadStream, func(c memferry.Capabilities) bool { return c.StreamReader != nil }},
		{"View", (*suite).testView, func(c memferry.Capabilities) bool { return c.Viewer != nil }},
		{"File", (*suite).testFile, func(c memferry.Capabilities) bool { return c.Filer != nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newSuite(t, open, o)
			if test.need != nil && !test.need(s.caps) {
				return // nothing to check: it does not claim to
			}
			test.run(s)
		})
	}
	t.Run("Model", func(t *testing.T) { testModel(t, open, o) })
}

func writable(c memferry.Capabilities) bool { return !c.ReadOnly }

func newSuite(t *testing.T, open Open, o Options) *suite {
	t.Helper()
	s := wrap(t, open(t), o)
	t.Cleanup(func() { _ = s.b.Close() }) // tests of Close look at its error
	seed := seedOf(t)
	t.Logf("seed %d (set MEMFERRY_SEED to repeat)", seed)
	s.rand = rand.New(rand.NewPCG(seed, 0))
	return s
}

func seedOf(t testing.TB) uint64 {
	if given := os.Getenv("MEMFERRY_SEED"); given != "" {
		seed, err := strconv.ParseInt(given, 10, 64)
		if err != nil {
			t.Fatalf("MEMFERRY_SEED: %v", err)
		}
		return uint64(seed)
	}
	return uint64(rand.Int64())
}

func wrap(t *testing.T, b memferry.Backend, o Options) *suite {
	t.Helper()
	c := memferry.CapabilitiesOf(b)
	s := &suite{T: t, b: b, caps: c, size: b.Size(), block: max(1, c.BlockSizes.Min), opts: o}
	if s.size < minSize || s.size < minBlocks*s.block {
		t.Fatalf("the suite needs a backend of at least %d bytes and %d blocks; this one has %d", minSize, minBlocks, s.size)
	}
	return s
}

// align rounds n down to what the backend takes.
func (s *suite) align(n int64) int64 { return n / s.block * s.block }

// random returns n random bytes.
func (s *suite) random(n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(s.rand.Uint32())
	}
	return p
}

func (s *suite) read(off, n int64) []byte {
	s.Helper()
	p := bytes.Repeat([]byte{0xdb}, int(n))
	if got, err := s.b.ReadAt(p, off); got != len(p) || err != nil {
		s.Fatalf("read of %d bytes at %d: %d, %v", n, off, got, err)
	}
	return p
}

func (s *suite) write(off int64, p []byte) {
	s.Helper()
	if n, err := s.b.WriteAt(p, off); n != len(p) || err != nil {
		s.Fatalf("write of %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

func (s *suite) expect(what string, off int64, want []byte) {
	s.Helper()
	got := s.read(off, int64(len(want)))
	if i := firstDifference(got, want); i >= 0 {
		s.Errorf("%s: the byte at %d is %#x, want %#x", what, off+int64(i), got[i], want[i])
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func (s *suite) expectError(what string, err, want error) {
	s.Helper()
	if !errors.Is(err, want) {
		s.Errorf("%s: %v; want %v", what, err, want)
	}
}

func (s *suite) testSize() {
	if s.size > memferry.MaxSize {
		s.Errorf("size %d is above the maximum", s.size)
	}
	if s.size%s.block != 0 {
		s.Errorf("size %d is no multiple of the block, %d", s.size, s.block)
	}
	if !s.caps.ReadOnly {
		s.write(s.size-s.block, s.random(s.block))
	}
	if got := s.b.Size(); got != s.size {
		s.Errorf("size was %d, is %d", s.size, got)
	}
}

func (s *suite) testReadsZero() {
	if s.opts.Filled {
		return
	}
	n := min(s.size, maxChecked)
	s.expect("new backend", 0, make([]byte, n))
	s.expect("new backend", s.size-n, make([]byte, n))
}

func (s *suite) testReadAtEnd() {
	tail := s.block * 3
	want := s.read(s.size-tail, tail)
	for _, tc := range []struct {
		off, n, want int64
		err          error
	}{
		{s.size - tail, tail, tail, nil},
		{s.size - tail, tail + s.block, tail, io.EOF},
		{s.size - s.block, 2 * s.block, s.block, io.EOF},
		{s.size, s.block, 0, io.EOF},
		{s.size + 5*s.block, s.block, 0, io.EOF},
		{s.align(math.MaxInt64 - s.block), s.block, 0, io.EOF},
		{0, 0, 0, nil},
		{s.size, 0, 0, nil},
	} {
		p := make([]byte, tc.n)
		n, err := s.b.ReadAt(p, tc.off)
		if int64(n) != tc.want || !errors.Is(err, tc.err) {
			s.Errorf("read of %d bytes at %d of %d: %d, %v; want %d, %v", tc.n, tc.off, s.size, n, err, tc.want, tc.err)
			continue
		}
		if n > 0 && !bytes.Equal(p[:n], want[tail-(s.size-tc.off):][:n]) {
			s.Errorf("read of %d bytes at %d of %d: wrong bytes", tc.n, tc.off, s.size)
		}
	}
}

func (s *suite) testReadOutOfRange() {
	for _, off := range []int64{-s.block, s.align(math.MinInt64)} {
		n, err := s.b.ReadAt(make([]byte, 2*s.block), off)
		if n != 0 {
			s.Errorf("read at %d: %d bytes", off, n)
		}
		s.expectError("read at a negative offset", err, memferry.ErrOutOfRange)
	}
}

func (s *suite) testWriteRead() {
	for _, r := range [][2]int64{{0, s.block}, {s.block, 5 * s.block}, {s.align(5000), s.align(40_000)}, {s.size - s.block, s.block}, {0, s.align(minSize)}, {3 * s.block, 0}} {
		before := s.read(0, s.align(min(s.size, maxChecked)))
		p := s.random(r[1])
		sent := bytes.Clone(p)
		s.write(r[0], p)
		if !bytes.Equal(p, sent) {
			s.Errorf("write of %d bytes at %d changed its argument", r[1], r[0])
		}
		s.expect("written bytes", r[0], p)
		if r[0]+r[1] <= int64(len(before)) {
			copy(before[r[0]:], p)
		}
		s.expect("after a write", 0, before[:min(int64(len(before)), s.size-s.block)])
	}
}

func (s *suite) testWriteOutOfRange() {
	tail := s.read(s.size-2*s.block, 2*s.block)
	for _, r := range [][2]int64{
		{s.size - s.block, 2 * s.block},
		{s.size, s.block},
		{s.size + 7*s.block, s.block},
		{-s.block, 2 * s.block},
		{s.align(math.MinInt64), s.block},
		{s.align(math.MaxInt64 - s.block), 2 * s.block},
	} {
		n, err := s.b.WriteAt(s.random(r[1]), r[0])
		if n != 0 {
			s.Errorf("write of %d bytes at %d of %d: wrote %d", r[1], r[0], s.size, n)
		}
		if s.caps.ReadOnly && errors.Is(err, memferry.ErrReadOnly) {
			continue
		}
		s.expectError("write out of range", err, memferry.ErrOutOfRange)
	}
	s.expect("after writes out of range", s.size-2*s.block, tail)
}

func (s *suite) testWriteKeepsNothing() {
	p := s.random(s.align(20_000))
	want := bytes.Clone(p)
	s.write(0, p)
	clear(p)
	s.expect("after the buffer was reused", 0, want)
	r := make([]byte, len(want))
	if _, err := s.b.ReadAt(r, 0); err != nil {
		s.Fatal(err)
	}
	clear(r)
	s.expect("after the read buffer was reused", 0, want)
}

func (s *suite) testReadOnly() {
	before := s.read(0, minSize)
	_, err := s.b.WriteAt(s.random(s.block), 0)
	s.expectError("write", err, memferry.ErrReadOnly)
	if t := s.caps.Trimmer; t != nil {
		s.expectError("trim", t.Trim(0, s.block), memferry.ErrReadOnly)
	}
	if z := s.caps.ZeroWriter; z != nil {
		s.expectError("write zeroes", z.WriteZeroes(0, s.block, 0), memferry.ErrReadOnly)
	}
	if v := s.caps.Viewer; v != nil {
		_, err := v.ViewForWrite(0, s.block)
		s.expectError("view for writing", err, memferry.ErrReadOnly)
	}
	s.expect("after refused writes", 0, before)
}

func (s *suite) testSync() {
	if !s.caps.ReadOnly {
		s.write(0, s.random(3*s.block))
	}
	for range 2 {
		if err := s.b.Sync(); err != nil {
			s.Errorf("sync: %v", err)
		}
	}
}

// testConcurrent has writers that each know what their own part holds.
func (s *suite) testConcurrent() {
	const writers, rounds = 8, 30
	part := s.align(minSize / writers)
	if part == 0 {
		part = s.block
	}
	var wg sync.WaitGroup
	for w := range min(int64(writers), s.size/part) {
		seed := s.rand.Uint64()
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			model := make([]byte, part)
			if _, err := s.b.WriteAt(model, w*part); err != nil {
				s.Errorf("write: %v", err)
				return
			}
			for i := range rounds {
				off := s.align(r.Int64N(part))
				p := bytes.Repeat([]byte{byte(i)}, int(max(s.block, s.align(r.Int64N(part-off+1)))))
				copy(model[off:], p)
				if _, err := s.b.WriteAt(p, w*part+off); err != nil {
					s.Errorf("write: %v", err)
					return
				}
				got := make([]byte, part)
				if _, err := s.b.ReadAt(got, w*part); err != nil || !bytes.Equal(got, model) {
					s.Errorf("writer %d, round %d: error %v, or another writer's bytes, at %d", w, i, err, firstDifference(got, model))
					return
				}
				if i%10 == 0 {
					if err := s.b.Sync(); err != nil {
						s.Errorf("sync: %v", err)
					}
				}
			}
		})
	}
	wg.Wait()
}

// testOverlapping checks that each byte is one writer's, and that bytes which
// no write covers stay.
func (s *suite) testOverlapping() {
	for range 20 {
		n := s.align(min(s.size, 3*minSize/4))
		s.write(0, bytes.Repeat([]byte{9}, int(n)))
		cut := func() (int64, int64) {
			a, b := s.align(s.rand.Int64N(n)), s.align(s.rand.Int64N(n))
			return min(a, b), max(a, b)
		}
		from, to := [3]int64{}, [3]int64{}
		var wg sync.WaitGroup
		for w := range int64(3) {
			from[w], to[w] = cut()
			wg.Go(func() {
				if _, err := s.b.WriteAt(bytes.Repeat([]byte{byte(w)}, int(to[w]-from[w])), from[w]); err != nil {
					s.Errorf("write: %v", err)
				}
			})
		}
		wg.Wait()
		for i, c := range s.read(0, n) {
			i := int64(i)
			covered := false
			for w := range int64(3) {
				in := from[w] <= i && i < to[w]
				covered = covered || in
				if c == byte(w) && !in {
					s.Fatalf("byte %d is from a write of [%d, %d)", i, from[w], to[w])
				}
			}
			if c > 2 && c != 9 || covered == (c == 9) {
				s.Fatalf("byte %d is %d; covered by a write: %v", i, c, covered)
			}
		}
	}
}

func (s *suite) testClose() {
	if err := s.b.Close(); err != nil {
		s.Errorf("close: %v", err)
	}
	if err := s.b.Close(); err != nil {
		s.Errorf("second close: %v", err)
	}
	p := make([]byte, s.block)
	_, err := s.b.ReadAt(p, 0)
	s.expectError("read after close", err, memferry.ErrClosed)
	_, err = s.b.WriteAt(p, 0)
	if !s.caps.ReadOnly || !errors.Is(err, memferry.ErrReadOnly) {
		s.expectError("write after close", err, memferry.ErrClosed)
	}
	s.expectError("sync after close", s.b.Sync(), memferry.ErrClosed)
	if s.b.Size() != s.size {
		s.Errorf("size after close: %d", s.b.Size())
	}
	s.capabilitiesAfterClose(p)
}

func (s *suite) capabilitiesAfterClose(p []byte) {
	ctx := s.Context()
	if c := s.caps.Trimmer; c != nil && !s.caps.ReadOnly {
		s.expectError("trim after close", c.Trim(0, s.block), memferry.ErrClosed)
	}
	if c := s.caps.ZeroWriter; c != nil && !s.caps.ReadOnly {
		s.expectError("write zeroes after close", c.WriteZeroes(0, s.block, 0), memferry.ErrClosed)
	}
	if c := s.caps.Extenter; c != nil {
		_, err := c.Extents(ctx, 0, s.block)
		s.expectError("extents after close", err, memferry.ErrClosed)
	}
	if c := s.caps.ContextReader; c != nil {
		_, err := c.ReadAtContext(ctx, p, 0)
		s.expectError("read with a context after close", err, memferry.ErrClosed)
	}
	if c := s.caps.ContextWriter; c != nil && !s.caps.ReadOnly {
		_, err := c.WriteAtContext(ctx, p, 0)
		s.expectError("write with a context after close", err, memferry.ErrClosed)
	}
	if c := s.caps.Viewer; c != nil {
		_, err := c.View(0, s.block)
		s.expectError("view after close", err, memferry.ErrClosed)
	}
}

// testCloseUnderLoad closes while calls run: they end, with nothing worse than
// ErrClosed.
func (s *suite) testCloseUnderLoad() {
	var done atomic.Int64
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			p := make([]byte, 2*s.block)
			for {
				var err error
				if w%2 == 0 || s.caps.ReadOnly {
					_, err = s.b.ReadAt(p, 0)
				} else {
					_, err = s.b.WriteAt(p, int64(w)*s.block)
				}
				if err != nil {
					if !s.opts.Volatile {
						s.expectError("call during close", err, memferry.ErrClosed)
					}
					return
				}
				done.Add(1)
			}
		})
	}
	for done.Load() < 20 && !s.Failed() {
		time.Sleep(time.Millisecond)
	}
	if err := s.b.Close(); err != nil {
		s.Errorf("close: %v", err)
	}
	wg.Wait()
}
