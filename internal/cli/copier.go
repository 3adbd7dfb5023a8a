package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/internal/zero"
)

// Limits of a copy.
const (
	// copyPiece is the longest read or write.
	copyPiece = 512 << 10
	// copyMemory bounds the data in flight by default, which at 200 ms is
	// 320 MiB/s.
	copyMemory = 64 << 20
	// copyMinWorkers is where the number of requests in flight starts. It
	// grows while that makes the copy faster.
	copyMinWorkers = 4
	// copyZeroes is the longest run of zeroes written in one request: a target
	// may take its time over each.
	copyZeroes = 128 << 20
	// copyQueue is how many pieces wait for a worker.
	copyQueue = 64
)

// copier copies one backend into another of at least its size.
type copier struct {
	src, dst   memferry.Backend
	srcC, dstC memferry.Capabilities
	piece      int64
	memory     int64
	// blank says that dst is known to read as zero all over.
	blank  bool
	verify bool

	data, zeroes atomic.Int64 // bytes done, of each kind
	checked      atomic.Int64 // bytes verified
	buffers      sync.Pool
}

func newCopier(dst, src memferry.Backend, memory int64) *copier {
	c := &copier{
		src: src, dst: dst,
		srcC: memferry.CapabilitiesOf(src), dstC: memferry.CapabilitiesOf(dst),
		piece: copyPiece, memory: memory,
	}
	for _, b := range []memferry.BlockSizes{c.srcC.BlockSizes, c.dstC.BlockSizes} {
		if b.Max > 0 {
			c.piece = min(c.piece, b.Max)
		}
	}
	if c.memory <= 0 {
		c.memory = copyMemory
	}
	c.piece = max(1, min(c.piece, c.memory))
	c.buffers.New = func() any { b := make([]byte, c.piece); return &b }
	return c
}

// check refuses pairs that can't work before anything is written.
func (c *copier) check() error {
	if c.dstC.ReadOnly {
		return withRemedy(memferry.ErrReadOnly, "copy to something that can be written")
	}
	if c.dst.Size() < c.src.Size() {
		return tooSmall(c.dst.Size(), c.src.Size())
	}
	return nil
}

func tooSmall(target, source int64) error {
	return withRemedy(fmt.Errorf("%s is too small for the source's %s", exactSize(target), exactSize(source)),
		"enlarge it (a file: add ?size=%d to its file: URL) or choose another", source)
}

func exactSize(n int64) string {
	if s := size.Format(n); s != fmt.Sprintf("%d B", n) {
		return fmt.Sprintf("%s (%d bytes)", s, n)
	}
	return fmt.Sprintf("%d bytes", n)
}

// span is a piece of work: n bytes at off, of data or of zeroes.
type span struct {
	off, n int64
	zero   bool
}

// run copies everything and syncs the target.
func (c *copier) run(ctx context.Context) error {
	if err := c.pass(ctx, c.move); err != nil {
		return err
	}
	if err := c.dst.Sync(); err != nil {
		return fmt.Errorf("sync the target: %w", err)
	}
	if !c.verify {
		return nil
	}
	return c.pass(ctx, c.compare)
}

// pass hands every span of the source to f, from several goroutines.
func (c *copier) pass(ctx context.Context, f func(context.Context, span) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	queue := make(chan span, copyQueue)
	g.Go(func() error {
		defer close(queue)
		return c.plan(ctx, queue)
	})
	most := int(max(1, c.memory/c.piece))
	var busy, started atomic.Int64
	var work func() error
	work = func() error {
		for s := range queue {
			// One more worker whenever all are busy and there is more to do: the
			// number in flight follows what the link and the memory allow.
			if n := started.Load(); busy.Add(1) == n && n < int64(most) && len(queue) > 0 {
				if started.CompareAndSwap(n, n+1) {
					g.Go(work)
				}
			}
			err := f(ctx, s)
			busy.Add(-1)
			if err != nil {
				return err
			}
		}
		return nil
	}
	first := min(copyMinWorkers, most)
	started.Store(int64(first))
	for range first {
		g.Go(work)
	}
	return g.Wait()
}

// plan sends the whole source to queue, in order.
func (c *copier) plan(ctx context.Context, queue chan<- span) error {
	total := c.src.Size()
	for off := int64(0); off < total; {
		extents, err := c.extents(ctx, off, total-off)
		if err != nil {
			return err
		}
		for _, e := range extents {
			zero := e.Flags&memferry.ExtentZero != 0
			if err := c.send(ctx, queue, span{e.Off, e.Len, zero}); err != nil {
				return err
			}
			off = e.Off + e.Len
		}
	}
	return nil
}

// extents asks the source where its data is. One that can't tell is all data.
func (c *copier) extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	if c.srcC.Extenter == nil {
		return []memferry.Extent{{Off: off, Len: n}}, nil
	}
	extents, err := c.srcC.Extenter.Extents(ctx, off, n)
	if errors.Is(err, memferry.ErrNotSupported) {
		return []memferry.Extent{{Off: off, Len: n}}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("extents at %d: %w", off, err)
	}
	if len(extents) == 0 || extents[0].Off != off {
		return nil, fmt.Errorf("extents at %d: the source left a gap: %w", off, memferry.ErrCorrupt)
	}
	return extents, nil
}

// send cuts s into spans no longer than one request, aligned to its length.
func (c *copier) send(ctx context.Context, queue chan<- span, s span) error {
	limit := c.piece
	if s.zero {
		limit = copyZeroes / c.piece * c.piece
		if c.blank {
			limit = s.n // nothing will be sent
		}
	}
	for end := s.off + s.n; s.off < end; {
		n := min(end-s.off, limit-s.off%limit)
		select {
		case queue <- span{s.off, n, s.zero}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		s.off += n
	}
	return nil
}

// zeroPage is what all-zero data is compared with.
var zeroPage [64 << 10]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroPage))
		if !bytes.Equal(p[:n], zeroPage[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

func (c *copier) move(ctx context.Context, s span) error {
	if s.zero {
		return c.zero(ctx, s)
	}
	buf := c.buffers.Get().(*[]byte)
	defer c.buffers.Put(buf)
	p := (*buf)[:s.n]
	if err := c.read(ctx, c.src, c.srcC, p, s.off); err != nil {
		return fmt.Errorf("read the source at %d: %w", s.off, err)
	}
	if (c.blank || c.dstC.ZeroWriter != nil) && isZero(p) {
		return c.zero(ctx, s)
	}
	if err := c.write(ctx, p, s.off); err != nil {
		return fmt.Errorf("write the target at %d: %w", s.off, err)
	}
	c.data.Add(s.n)
	return nil
}

func (c *copier) read(ctx context.Context, b memferry.Backend, caps memferry.Capabilities, p []byte, off int64) error {
	var n int
	var err error
	if caps.ContextReader != nil {
		n, err = caps.ContextReader.ReadAtContext(ctx, p, off)
	} else {
		n, err = b.ReadAt(p, off)
	}
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%d of %d bytes: %w", n, len(p), io.ErrUnexpectedEOF)
	}
	return err
}

func (c *copier) write(ctx context.Context, p []byte, off int64) error {
	var err error
	if c.dstC.ContextWriter != nil {
		_, err = c.dstC.ContextWriter.WriteAtContext(ctx, p, off)
	} else {
		_, err = c.dst.WriteAt(p, off)
	}
	return err
}

// zero makes the target read as zero there, by the cheapest way it has.
func (c *copier) zero(ctx context.Context, s span) error {
	if !c.blank {
		err := memferry.ErrNotSupported
		if c.dstC.ZeroWriter != nil {
			err = c.dstC.ZeroWriter.WriteZeroes(s.off, s.n, 0)
		}
		if errors.Is(err, memferry.ErrNotSupported) {
			err = zero.Write(s.off, s.n, c.piece, func(p []byte, off int64) error { return c.write(ctx, p, off) })
		}
		if err != nil {
			return fmt.Errorf("zero the target at %d: %w", s.off, err)
		}
	}
	c.zeroes.Add(s.n)
	return nil
}

// compare reads a span from both sides.
func (c *copier) compare(ctx context.Context, s span) error {
	a, b := c.buffers.Get().(*[]byte), c.buffers.Get().(*[]byte)
	defer c.buffers.Put(a)
	defer c.buffers.Put(b)
	for s.n > 0 {
		n := min(s.n, c.piece)
		p, q := (*a)[:n], (*b)[:n]
		if s.zero {
			clear(p)
		} else if err := c.read(ctx, c.src, c.srcC, p, s.off); err != nil {
			return fmt.Errorf("verify: read the source at %d: %w", s.off, err)
		}
		if err := c.read(ctx, c.dst, c.dstC, q, s.off); err != nil {
			return fmt.Errorf("verify: read the target at %d: %w", s.off, err)
		}
		if !bytes.Equal(p, q) {
			return withRemedy(fmt.Errorf("verify: the target differs between %d and %d", s.off, s.off+n),
				"something else wrote to one of them meanwhile, or the medium is bad")
		}
		c.checked.Add(n)
		s.off, s.n = s.off+n, s.n-n
	}
	return nil
}

// done is how far the copy is, in bytes of total.
func (c *copier) done() (done, total int64) {
	done, total = c.data.Load()+c.zeroes.Load(), c.src.Size()
	if c.verify {
		done, total = done+c.checked.Load(), 2*total
	}
	return done, total
}
