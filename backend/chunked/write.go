package chunked

import (
	"context"
	"fmt"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/zero"
)

func (b *Backend) checkWrite(op string, off, n int64) error {
	if err := memferry.CheckRange(op, off, n, b.size); err != nil {
		return err
	}
	if b.opts.ReadOnly {
		return fmt.Errorf("%s at %d: %w", op, off, memferry.ErrReadOnly)
	}
	return nil
}

// change runs f on the pieces of a range, each under its chunk's lock.
func (b *Backend) change(ctx context.Context, op string, off, n int64, f func(context.Context, piece) error) (int64, error) {
	if err := b.checkWrite(op, off, n); err != nil {
		return 0, err
	}
	done := int64(0)
	err := b.work(ctx, op, func(ctx context.Context) error {
		if n > 0 && b.opts.BeforeWrite != nil {
			if err := b.opts.BeforeWrite(); err != nil {
				return err
			}
		}
		var err error
		done, err = b.each(ctx, off, n, func(ctx context.Context, c piece) error {
			l := b.locks[c.index%stripes]
			if err := l.acquire(ctx); err != nil {
				return err
			}
			defer l.release()
			return f(ctx, c)
		})
		return err
	})
	return done, err
}

// WriteAt is WriteAtContext without a context.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	return b.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext replaces whole chunks, and reads, changes and puts back the
// others.
func (b *Backend) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := b.change(ctx, "write", off, int64(len(p)), func(ctx context.Context, c piece) error {
		part := p[c.at : c.at+c.n]
		if b.whole(c) {
			return b.put(ctx, c.index, part)
		}
		return b.modify(ctx, c, func(chunk []byte) { copy(chunk[c.off:], part) })
	})
	return int(n), err
}

func (b *Backend) put(ctx context.Context, index int64, p []byte) error {
	if err := b.store.Put(ctx, index, p); err != nil {
		return fmt.Errorf("put chunk %d: %w", index, err)
	}
	return nil
}

// modify changes a part of a chunk.
func (b *Backend) modify(ctx context.Context, c piece, f func(chunk []byte)) error {
	buf := b.buffer()
	defer b.buffers.Put(buf)
	p := (*buf)[:b.chunkLen(c.index)]
	if _, err := b.get(ctx, c.index, p); err != nil {
		return err
	}
	f(p)
	return b.put(ctx, c.index, p)
}

// Trim zeroes the range and deletes the chunks that are zero then.
func (b *Backend) Trim(off, n int64) error {
	_, err := b.change(context.Background(), "trim", off, n, b.zero)
	return err
}

// WriteZeroes does so as well, unless the range shall stay allocated.
func (b *Backend) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	const op = "write zeroes"
	if err := b.checkWrite(op, off, n); err != nil {
		return err
	}
	f := b.zero
	if flags&memferry.ZeroNoHole != 0 {
		if flags&memferry.ZeroFast != 0 {
			return fmt.Errorf("%s: fast zeroing of allocated chunks: %w", op, memferry.ErrNotSupported)
		}
		f = b.zeroInPlace
	}
	_, err := b.change(context.Background(), op, off, n, f)
	return err
}

// zero zeroes a piece of a chunk that need not stay.
func (b *Backend) zero(ctx context.Context, c piece) error {
	if b.whole(c) {
		return b.remove(ctx, c.index)
	}
	buf := b.buffer()
	defer b.buffers.Put(buf)
	p := (*buf)[:b.chunkLen(c.index)]
	n, err := b.get(ctx, c.index, p)
	if err != nil || n == 0 { // of a hole, nothing is left to do
		return err
	}
	clear(p[c.off : c.off+c.n])
	if zero.Is(p) {
		return b.remove(ctx, c.index)
	}
	return b.put(ctx, c.index, p)
}

func (b *Backend) zeroInPlace(ctx context.Context, c piece) error {
	return b.modify(ctx, c, func(chunk []byte) { clear(chunk[c.off : c.off+c.n]) })
}

func (b *Backend) remove(ctx context.Context, index int64) error {
	if err := b.store.Delete(ctx, index); err != nil {
		return fmt.Errorf("delete chunk %d: %w", index, err)
	}
	return nil
}
