// Package chunked makes a backend of a store of chunks.
//
// A chunk that was never put is a hole and reads as zero. A write of whole
// chunks replaces them; one of a part reads the chunk, changes it and puts it
// back. Chunks that become zero as a whole are deleted.
//
// # Locks
//
// Changes of one chunk take turns, under one of a fixed number of locks that
// the chunks share. Such a lock is held while the store works on the chunk:
// without it, of two writes to different parts of a chunk one would be lost.
// Reads take no lock, because a store replaces chunks atomically.
package chunked

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/extent"
	"github.com/memferry/memferry/internal/gate"
)

// Limits and defaults.
const (
	DefaultChunkSize = 256 << 10
	MinChunkSize     = memferry.PageSize
	MaxChunkSize     = 64 << 20 // one is held in memory whole, per call at work

	// DefaultParallel is how many chunks one call works on at once.
	DefaultParallel = 4
	// MaxParallel bounds that.
	MaxParallel = 1024

	// stripes is how many locks the chunks share: enough that two chunks at
	// work rarely share one.
	stripes = 256
	// maxProbes bounds how many chunks one call of Extents asks the store for.
	maxProbes = 1 << 14
)

// Store keeps chunks by index. All methods are safe for concurrent use, and
// return early with an error when ctx is done. Close of the backend cancels
// it.
type Store interface {
	// Get fills p with chunk index and returns len(p). If there is no such
	// chunk, it returns 0 and nil. p has the length of the chunk.
	Get(ctx context.Context, index int64, p []byte) (n int, err error)
	// Put stores p as chunk index, atomically: a Get at the same time, or after
	// a crash, finds the old chunk or the new one. The store does not keep p.
	Put(ctx context.Context, index int64, p []byte) error
	// Delete removes chunk index. It is no error that there is none.
	Delete(ctx context.Context, index int64) error
}

// RangeStore is a Store that can read part of a chunk.
type RangeStore interface {
	// GetRange fills p with the bytes at off in chunk index, and otherwise is
	// as Get.
	GetRange(ctx context.Context, index, off int64, p []byte) (n int, err error)
}

// Finder is a Store that knows which chunks it has.
type Finder interface {
	// Find returns the first chunk from index on, below end. It may stop
	// looking early and return what it did not look at: then found is false
	// and next the index to go on with; otherwise next is end.
	Find(ctx context.Context, index, end int64) (next int64, found bool, err error)
}

// Syncer is a Store that has something to do to make changes durable.
type Syncer interface {
	// Sync returns nil once what was put and deleted before survives a crash.
	Sync() error
}

// Options adapt a backend. The zero value works.
type Options struct {
	// Parallel is how many chunks one call works on at once.
	Parallel int
	// ReadOnly makes every write fail.
	ReadOnly bool
	// Close, if not nil, is called once, after the last call has returned.
	Close func() error
	// Generation, if not nil, makes the backend a memferry.Generationer.
	Generation func(context.Context) (string, error)
	// BeforeWrite, if not nil, is called before each change of the store. An
	// error refuses the change.
	BeforeWrite func() error
}

func (o Options) withDefaults() (Options, error) {
	if o.Parallel == 0 {
		o.Parallel = DefaultParallel
	}
	if o.Parallel < 0 || o.Parallel > MaxParallel {
		return o, fmt.Errorf("%d chunks at once: must be from 1 to %d", o.Parallel, MaxParallel)
	}
	return o, nil
}

// CheckChunkSize validates a chunk size.
func CheckChunkSize(n int64) error {
	if n < MinChunkSize || n > MaxChunkSize || n&(n-1) != 0 {
		return fmt.Errorf("chunk size %d: must be a power of two from %d to %d", n, MinChunkSize, MaxChunkSize)
	}
	return nil
}

// Backend is a store of chunks.
type Backend struct {
	store  Store
	ranges RangeStore // nil where the store is none
	finder Finder     // nil where the store is none
	syncer Syncer     // nil where the store is none
	size   int64
	chunk  int64
	opts   Options
	caps   memferry.Capabilities

	locks   [stripes]lock
	buffers sync.Pool // of *[]byte, one chunk long
	gate    gate.Gate
	closing context.Context // done from Close on
	cancel  context.CancelFunc
	close   func() error // once
}

var (
	_ memferry.Backend  = (*Backend)(nil)
	_ memferry.Capabler = (*Backend)(nil)
)

// New returns a backend of size bytes in chunks of chunkSize. The last chunk
// is shorter where size is not a multiple.
func New(store Store, size, chunkSize int64, o Options) (*Backend, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := CheckChunkSize(chunkSize); err != nil {
		return nil, err
	}
	if size < 0 || size > memferry.MaxSize {
		return nil, fmt.Errorf("size %d: must be from 0 to %d", size, int64(memferry.MaxSize))
	}
	b := &Backend{store: store, size: size, chunk: chunkSize, opts: o}
	b.ranges, _ = store.(RangeStore)
	b.finder, _ = store.(Finder)
	b.syncer, _ = store.(Syncer)
	b.buffers.New = func() any {
		p := make([]byte, chunkSize)
		return &p
	}
	for i := range b.locks {
		b.locks[i] = make(lock, 1)
	}
	b.closing, b.cancel = context.WithCancel(context.Background())
	b.close = sync.OnceValue(b.closeOnce)
	b.caps = b.capabilities()
	return b, nil
}

func (b *Backend) capabilities() memferry.Capabilities {
	c := memferry.Capabilities{
		ContextReader: b,
		ReadOnly:      b.opts.ReadOnly,
		BlockSizes:    memferry.BlockSizes{Min: 1, Preferred: b.chunk},
	}
	if b.finder != nil {
		c.Extenter = b
	}
	if b.opts.Generation != nil {
		c.Generationer = b
	}
	if !b.opts.ReadOnly {
		c.ContextWriter, c.Trimmer, c.ZeroWriter = b, b, b
	}
	return c
}

// Capabilities tells what the store can do.
func (b *Backend) Capabilities() memferry.Capabilities { return b.caps }

// ChunkSize returns the size of a chunk.
func (b *Backend) ChunkSize() int64 { return b.chunk }

// Size returns the size given to New.
func (b *Backend) Size() int64 { return b.size }

// Close ends the calls at work, waits until they have returned, and closes
// the store. Every call of it returns the same.
func (b *Backend) Close() error { return b.close() }

func (b *Backend) closeOnce() error {
	b.gate.Shut()
	b.cancel()
	<-b.gate.Idle()
	if b.opts.Close != nil {
		return b.opts.Close()
	}
	return nil
}

func closed(op string) error { return fmt.Errorf("%s: %w", op, memferry.ErrClosed) }

// work runs f with a context that ends with Close.
func (b *Backend) work(ctx context.Context, op string, f func(context.Context) error) error {
	if !b.gate.Enter() {
		return closed(op)
	}
	defer b.gate.Leave()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(b.closing, cancel)
	defer stop()
	err := f(ctx)
	if err != nil && b.closing.Err() != nil && errors.Is(err, context.Canceled) {
		return closed(op)
	}
	return err
}

// piece is the part of a range that lies in one chunk.
type piece struct {
	index  int64
	off, n int64 // in the chunk
	at     int64 // in the range
}

func (b *Backend) chunkLen(index int64) int64 { return min(b.chunk, b.size-index*b.chunk) }

func (b *Backend) whole(p piece) bool { return p.n == b.chunkLen(p.index) }

// each runs f for the pieces of a range, several at once. On failure it
// returns how many bytes before the first failed piece are done, and that
// piece's error.
func (b *Backend) each(ctx context.Context, off, n int64, f func(context.Context, piece) error) (int64, error) {
	if n == 0 {
		return 0, nil
	}
	if off/b.chunk == (off+n-1)/b.chunk {
		if err := f(ctx, piece{index: off / b.chunk, off: off % b.chunk, n: n}); err != nil {
			return 0, err
		}
		return n, nil
	}
	var (
		mu      sync.Mutex
		failed  = n
		failure error
		at      int64
	)
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(b.opts.Parallel)
	for at < n && each.Err() == nil {
		p := piece{index: (off + at) / b.chunk, off: (off + at) % b.chunk, at: at}
		p.n = min(b.chunk-p.off, n-at)
		at += p.n
		g.Go(func() error {
			err := f(each, p)
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = min(failed, p.at)
				// A failure cancels the others; it says more than they do.
				if failure == nil || errors.Is(failure, context.Canceled) {
					failure = err
				}
			}
			return err
		})
	}
	_ = g.Wait() // failure is the better one
	if failure == nil && at < n {
		failed, failure = at, ctx.Err()
	}
	return failed, failure
}

// ReadAt is ReadAtContext without a context.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	return b.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext gets the chunks of the range, or the parts that the store can
// give.
func (b *Backend) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, end := memferry.CheckRead(off, len(p), b.size)
	if end != nil && !errors.Is(end, io.EOF) {
		return 0, end
	}
	done := int64(0)
	err := b.work(ctx, "read", func(ctx context.Context) error {
		var err error
		done, err = b.each(ctx, off, int64(n), func(ctx context.Context, c piece) error {
			return b.readPiece(ctx, c, p[c.at:c.at+c.n])
		})
		return err
	})
	if err != nil {
		return int(done), err
	}
	return n, end
}

func (b *Backend) readPiece(ctx context.Context, c piece, p []byte) error {
	var (
		n   int
		err error
	)
	switch {
	case b.whole(c):
		n, err = b.store.Get(ctx, c.index, p)
	case b.ranges != nil:
		n, err = b.ranges.GetRange(ctx, c.index, c.off, p)
	default:
		buf := b.buffer()
		defer b.buffers.Put(buf)
		whole := (*buf)[:b.chunkLen(c.index)]
		if n, err = b.get(ctx, c.index, whole); err == nil {
			n = copy(p, whole[c.off:c.off+c.n])
		}
	}
	return b.checkGet(c.index, n, p, err)
}

func (b *Backend) buffer() *[]byte { return b.buffers.Get().(*[]byte) }

// get gets a whole chunk, zeroes where there is none.
func (b *Backend) get(ctx context.Context, index int64, p []byte) (int, error) {
	n, err := b.store.Get(ctx, index, p)
	return n, b.checkGet(index, n, p, err)
}

// checkGet clears p where there was no chunk.
func (b *Backend) checkGet(index int64, n int, p []byte, err error) error {
	switch {
	case err != nil:
		return fmt.Errorf("get chunk %d: %w", index, err)
	case n == 0:
		clear(p)
	case n != len(p):
		return fmt.Errorf("get chunk %d: %d bytes where %d must be: %w", index, n, len(p), memferry.ErrCorrupt)
	}
	return nil
}

// Sync syncs the store, where it has that.
func (b *Backend) Sync() error {
	return b.work(context.Background(), "sync", func(context.Context) error {
		if b.syncer == nil {
			return nil
		}
		return b.syncer.Sync()
	})
}

// Generation returns what the options' function does.
func (b *Backend) Generation(ctx context.Context) (string, error) {
	if b.opts.Generation == nil {
		return "", nil
	}
	var g string
	err := b.work(ctx, "generation", func(ctx context.Context) error {
		var err error
		g, err = b.opts.Generation(ctx)
		return err
	})
	return g, err
}

// Extents tells the chunks that the store has from the others.
func (b *Backend) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	if err := memferry.CheckRange("extents", off, n, b.size); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, fmt.Errorf("extents of 0 bytes at %d: %w", off, memferry.ErrOutOfRange)
	}
	if b.finder == nil {
		return nil, fmt.Errorf("extents: %w", memferry.ErrNotSupported)
	}
	var extents []memferry.Extent
	err := b.work(ctx, "extents", func(ctx context.Context) error {
		var err error
		extents, err = b.extents(ctx, off, off+n)
		return err
	})
	return extents, err
}

func (b *Backend) extents(ctx context.Context, off, end int64) ([]memferry.Extent, error) {
	l := extent.New(off, end)
	last := (end-1)/b.chunk + 1
	// Each round adds two at most.
	for probes := 0; l.Next() < end && probes < maxProbes && len(l.Extents) < memferry.MaxExtents-1; probes++ {
		index := l.Next() / b.chunk
		next, found, err := b.finder.Find(ctx, index, last)
		if err != nil {
			return nil, fmt.Errorf("find chunks from %d on: %w", index, err)
		}
		if next > index {
			l.Add(b.start(next), extent.Hole)
		}
		if found {
			l.Add(b.start(next+1), 0)
		} else if next <= index {
			return nil, fmt.Errorf("find chunks from %d on: no progress: %w", index, memferry.ErrCorrupt)
		}
	}
	return l.Extents, nil
}

// start returns where chunk index starts, or the end.
func (b *Backend) start(index int64) int64 {
	if index > b.size/b.chunk {
		return b.size
	}
	return index * b.chunk
}

// lock is a mutex that a context can end the wait for.
type lock chan struct{}

func (l lock) acquire(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l lock) release() { <-l }
