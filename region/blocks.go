package region

import (
	"context"
	"fmt"
	"sync"

	"github.com/memferry/memferry"
)

const (
	// maxBlock bounds the blocks of a remote, in bytes: each write of a part of
	// one takes a buffer of that size.
	maxBlock = 1 << 20
	// maxBlockBuffers bounds the memory of such writes, in bytes.
	maxBlockBuffers = 8 << 20
	// blockStripes is how many locks the blocks share.
	blockStripes = 64
)

// blocks is a remote that takes nothing but whole blocks, larger than a page,
// made one that takes any bytes: blocks that a write covers in part are read,
// changed and written back, during which no other write of this process touches
// them. It offers what the remote does, except for streams, batches and memory.
//
// What another client of the remote writes into the same block meanwhile may be
// undone; a region expects to be the only one that writes.
type blocks struct {
	endpoint
	size    int64 // of a block
	stripes [blockStripes]sync.RWMutex
	room    chan struct{} // a token for each write of a part of a block
}

// newBlocks wraps a remote whose blocks are larger than a page, and returns
// others as they are.
func newBlocks(e endpoint) (endpoint, error) {
	size := e.can.BlockSizes.Min
	switch {
	case size <= pageSize:
		return e, nil
	case size > maxBlock:
		return e, fmt.Errorf("the remote takes blocks of %d bytes at least, and a region can make do with %d: %w; serve it with smaller blocks",
			size, maxBlock, memferry.ErrNotSupported)
	case e.Size()%size != 0:
		return e, fmt.Errorf("the remote's size of %d bytes is no multiple of its blocks of %d: %w; serve it with smaller blocks",
			e.Size(), size, memferry.ErrNotSupported)
	}
	return newEndpoint(&blocks{endpoint: e, size: size, room: make(chan struct{}, maxBlockBuffers/size)}), nil
}

// Capabilities implements memferry.Capabler.
func (b *blocks) Capabilities() memferry.Capabilities {
	c := memferry.Capabilities{
		ContextReader: b, ContextWriter: b, ReadOnly: b.can.ReadOnly,
		Generationer: b.can.Generationer, Fencer: b.can.Fencer,
		BlockSizes: memferry.BlockSizes{Preferred: max(b.can.BlockSizes.Preferred, b.size)},
	}
	if b.can.Trimmer != nil {
		c.Trimmer = b
	}
	if b.can.ZeroWriter != nil {
		c.ZeroWriter = b
	}
	if b.can.Extenter != nil {
		c.Extenter = b
	}
	return c
}

// part is a run of bytes that is either within one block or whole blocks.
type part struct {
	off, n int64
	whole  bool
}

// parts divides a range: a part of a block, whole blocks, a part of a block.
func (b *blocks) parts(off, n int64) []part {
	end := off + n
	head := min(b.up(off), end)
	tail := max(b.down(end), head)
	var all []part
	for _, p := range []part{{off, head - off, false}, {head, tail - head, true}, {tail, end - tail, false}} {
		if p.n > 0 {
			all = append(all, p)
		}
	}
	return all
}

func (b *blocks) down(off int64) int64 { return off - off%b.size }
func (b *blocks) up(off int64) int64   { return b.down(off + b.size - 1) }

// ReadAt implements memferry.Backend.
func (b *blocks) ReadAt(p []byte, off int64) (int, error) {
	return b.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext implements memferry.ContextReader.
func (b *blocks) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	n, eof := memferry.CheckRead(off, len(p), b.Size())
	if n == 0 {
		if _, err := b.Backend.ReadAt(nil, 0); err != nil { // closed
			return 0, err
		}
		return 0, eof
	}
	done := int64(0)
	for _, c := range b.parts(off, int64(n)) {
		q := p[done : done+c.n]
		var err error
		if c.whole {
			err = b.read(ctx, q, c.off)
		} else {
			block := make([]byte, b.size)
			if err = b.read(ctx, block, b.down(c.off)); err == nil {
				copy(q, block[c.off%b.size:])
			}
		}
		if err != nil {
			return int(done), err
		}
		done += c.n
	}
	return n, eof
}

// WriteAt implements memferry.Backend.
func (b *blocks) WriteAt(p []byte, off int64) (int, error) {
	return b.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext implements memferry.ContextWriter.
func (b *blocks) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := b.check("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	done := int64(0)
	for _, c := range b.parts(off, int64(len(p))) {
		q := p[done : done+c.n]
		err := b.change(ctx, c, func() error {
			_, err := b.write(ctx, q, c.off)
			return err
		}, func(part []byte) { copy(part, q) })
		if err != nil {
			return int(done), err
		}
		done += c.n
	}
	return len(p), nil
}

// check validates what is going to be changed, before a part of it is.
func (b *blocks) check(op string, off, n int64) error {
	if err := memferry.CheckRange(op, off, n, b.Size()); err != nil {
		return err
	}
	if b.can.ReadOnly {
		return fmt.Errorf("%s of %d bytes at %d: %w", op, n, off, memferry.ErrReadOnly)
	}
	// Nothing may be left to do, but a backend that was closed says so.
	_, err := b.Backend.WriteAt(nil, 0)
	return err
}

// change runs whole on whole blocks, or modify on a part of one that was read
// and is then written back.
func (b *blocks) change(ctx context.Context, c part, whole func() error, modify func(part []byte)) error {
	if c.whole {
		release := b.share(c)
		defer release()
		return whole()
	}
	select {
	case b.room <- struct{}{}:
		defer func() { <-b.room }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	l := &b.stripes[c.off/b.size%blockStripes]
	l.Lock()
	defer l.Unlock()
	block, at := make([]byte, b.size), b.down(c.off)
	if err := b.read(ctx, block, at); err != nil {
		return err
	}
	modify(block[c.off-at : c.off-at+c.n])
	_, err := b.write(ctx, block, at)
	return err
}

// share keeps the blocks of c from being read and written back. Its locks are
// taken in ascending order: others may be waiting to have one for themselves.
func (b *blocks) share(c part) (release func()) {
	first, n := c.off/b.size, c.n/b.size
	var held []*sync.RWMutex
	for i := range int64(blockStripes) {
		if (i-first%blockStripes+blockStripes)%blockStripes < n {
			b.stripes[i].RLock()
			held = append(held, &b.stripes[i])
		}
	}
	return func() {
		for _, l := range held {
			l.RUnlock()
		}
	}
}

// WriteZeroes implements memferry.ZeroWriter. Parts of blocks are written.
func (b *blocks) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	if err := b.check("write zeroes", off, n); err != nil {
		return err
	}
	parts := b.parts(off, n)
	for _, c := range parts {
		if !c.whole && flags&memferry.ZeroFast != 0 {
			return fmt.Errorf("fast zeroes in a part of a block at %d: %w", c.off, memferry.ErrNotSupported)
		}
	}
	for _, c := range parts {
		err := b.change(context.Background(), c, func() error {
			return b.can.ZeroWriter.WriteZeroes(c.off, c.n, flags)
		}, func(part []byte) { clear(part) })
		if err != nil {
			return err
		}
	}
	return nil
}

// Trim implements memferry.Trimmer. Parts of blocks stay.
func (b *blocks) Trim(off, n int64) error {
	if err := b.check("trim", off, n); err != nil {
		return err
	}
	for _, c := range b.parts(off, n) {
		if !c.whole {
			continue
		}
		err := b.change(context.Background(), c, func() error { return b.can.Trimmer.Trim(c.off, c.n) }, nil)
		if err != nil {
			return err
		}
	}
	return nil
}

// Extents implements memferry.Extenter.
func (b *blocks) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	if err := memferry.CheckRange("extents", off, n, b.Size()); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, fmt.Errorf("extents of 0 bytes at %d: %w", off, memferry.ErrOutOfRange)
	}
	from := b.down(off)
	extents, err := b.can.Extenter.Extents(ctx, from, b.up(off+n)-from)
	if err != nil {
		return nil, err
	}
	clipped := extents[:0]
	for _, e := range extents {
		lo, hi := max(e.Off, off), min(e.Off+e.Len, off+n)
		if lo < hi {
			clipped = append(clipped, memferry.Extent{Off: lo, Len: hi - lo, Flags: e.Flags})
		}
	}
	if len(clipped) == 0 { // less than what was asked for: all that is known is that it is there
		return []memferry.Extent{{Off: off, Len: min(n, b.up(off+1)-off)}}, nil
	}
	return clipped, nil
}
