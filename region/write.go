package region

import (
	"context"
	"fmt"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

const (
	// maxWriteSpan bounds how much of one write is announced at once.
	maxWriteSpan = 64 << 20
)

// WriteAt writes to the local backend; see [memferry.Backend]. It waits for the
// remote only where it covers part of a page that is absent.
func (r *Region) WriteAt(p []byte, off int64) (int, error) {
	return r.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext is WriteAt that stops waiting for the remote when ctx is done.
func (r *Region) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := r.checkWrite("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	w := newWait(ctx, r.o.IOTimeout)
	for done := 0; done < len(p); {
		q := p[done:min(len(p), done+maxWriteSpan)]
		err := r.change(w, off+int64(done), int64(len(q)), func(off int64) error {
			_, err := r.local.WriteAt(q, off)
			return err
		})
		if err != nil {
			return done, err
		}
		done += len(q)
	}
	return len(p), nil
}

// Trim makes a range read as zero, and gives its storage back, here and at the
// remote.
func (r *Region) Trim(off, n int64) error {
	return r.zero("trim", off, n, 0)
}

// WriteZeroes makes a range read as zero. See [memferry.ZeroWriter].
func (r *Region) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	if flags&memferry.ZeroFast != 0 && r.local.can.ZeroWriter == nil {
		return fmt.Errorf("fast zero of %d bytes at %d: %w", n, off, memferry.ErrNotSupported)
	}
	return r.zero("write zeroes", off, n, flags&^memferry.ZeroFast)
}

func (r *Region) zero(op string, off, n int64, flags memferry.ZeroFlags) error {
	if err := r.checkWrite(op, off, n); err != nil {
		return err
	}
	w := newWait(context.Background(), r.o.IOTimeout)
	for end := off + n; off < end; {
		// Pieces end at page borders, so that whole pages stay whole.
		k := min(end, (off+maxWriteSpan)&^(pageSize-1)) - off
		if head := off % pageSize; head != 0 {
			k = min(k, pageSize-head)
		} else if tail := end % pageSize; tail != 0 && off+k == end && k > tail && end != r.size {
			k -= tail
		}
		err := r.change(w, off, k, func(off int64) error {
			return r.local.zero(context.Background(), off, k, flags)
		})
		if err != nil {
			return err
		}
		off += k
	}
	return nil
}

func (r *Region) checkWrite(op string, off, n int64) error {
	if r.closed.Load() {
		return memferry.ErrClosed
	}
	if err := memferry.CheckRange(op, off, n, r.size); err != nil {
		return err
	}
	if r.o.ReadOnly {
		return fmt.Errorf("%s of %d bytes at %d: %w", op, n, off, memferry.ErrReadOnly)
	}
	return nil
}

// change runs one local write of n bytes at off. The order is what keeps
// crashes and pushes right: partial pages are made present, the pages are
// claimed, the store is told, the bytes are written, the pages are dirty.
func (r *Region) change(w *wait, off, n int64, write func(off int64) error) error {
	page, pages := pagesOf(off, n)
	if err := r.beginWrite(w, off, n); err != nil {
		return err
	}
	if err := r.intend(page, pages); err != nil {
		r.endWrite(func() {
			r.table.AbortWrite(page, pages)
			r.pull.rewind(page) // what was on its way for it is dropped
			r.pull.kick()
		}, page, pages)
		r.noteError(ErrorStore, err)
		return err
	}
	err := write(off)
	r.endWrite(func() {
		r.table.EndWrite(page, pages, err == nil)
		r.noteComplete()
		r.wroteLocked(err)
		if err != nil {
			r.pull.rewind(page) // it may be absent again
			r.pull.kick()
		}
	}, page, pages)
	if err == nil {
		return nil
	}
	if r.closed.Load() {
		return memferry.ErrClosed
	}
	err = fmt.Errorf("write local copy: %w", localError(err))
	r.noteError(ErrorLocal, err)
	return err
}

func (r *Region) wroteLocked(err error) {
	r.push.wrote(time.Now())
	if b := r.o.PushBacklog; b > 0 && r.table.Counts().Dirty*pageSize >= b {
		r.push.kick()
	}
	if err != nil {
		r.noteFullLocked(localError(err))
	}
}

// beginWrite claims the pages of a write.
func (r *Region) beginWrite(w *wait, off, n int64) error {
	page, pages := pagesOf(off, n)
	headPartial := off%pageSize != 0
	tailPartial := (off+n)%pageSize != 0 && off+n != r.size
	for {
		if headPartial {
			if err := r.ensurePage(w, page); err != nil {
				return err
			}
		}
		if tailPartial {
			if err := r.ensurePage(w, page+pages-1); err != nil {
				return err
			}
		}
		r.mu.Lock()
		if r.closed.Load() {
			r.mu.Unlock()
			return memferry.ErrClosed
		}
		// What was ensured still holds, unless it was invalidated.
		if headPartial && !r.table.Resident(page, 1) || tailPartial && !r.table.Resident(page+pages-1, 1) {
			r.mu.Unlock()
			continue
		}
		busy := r.table.BeginWrite(page, pages)
		if busy < 0 {
			r.writers++
			r.mu.Unlock()
			return nil
		}
		wt := r.waiterLocked(busy)
		r.mu.Unlock()
		// What is in the way is local work, which always ends.
		if err := w.on(r.ctx, wt.ch, time.Time{}); err != nil {
			return err
		}
	}
}

func (r *Region) ensurePage(w *wait, page int64) error {
	if r.table.Resident(page, 1) {
		return nil
	}
	return r.ensure(w, page, 1)
}

// intend tells the store which of its clean pages will change.
func (r *Region) intend(page, n int64) error {
	if r.o.Store == nil {
		return nil
	}
	r.mu.Lock()
	var buf [4]chunk.Run
	runs := r.table.Intents(page, n, buf[:0])
	r.mu.Unlock()
	for _, run := range runs {
		if err := r.o.Store.Intend(run.Page, run.N); err != nil {
			return fmt.Errorf("record a write of %d pages at page %d in the cache: %w", run.N, run.Page, localError(err))
		}
	}
	return nil
}

func (r *Region) endWrite(end func(), page, pages int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	end()
	r.writers--
	if r.writers == 0 {
		r.quiet.Broadcast()
	}
	r.wakeLocked(page, pages, nil)
}
