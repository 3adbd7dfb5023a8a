package region

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

// Run is N pages from Page on.
type Run = chunk.Run

// Dropper is a local backend that others change as well, behind the region's
// back, or that must know when its bytes are no longer valid.
type Dropper interface {
	// Drop forgets n pages, which the region neither reads nor writes meanwhile,
	// and returns, in ascending order, the runs of those that must stay: they
	// were changed, or it failed.
	Drop(ctx context.Context, page, n int64) (kept []Run, err error)
}

// maxDropRun bounds how much is dropped in one step, in pages: reads and writes
// of it wait that long.
const maxDropRun = 256 << 20 / pageSize

// invalidator is what Invalidate needs beside the table.
type invalidator struct {
	turn    sync.Mutex // one at a time
	dropper Dropper    // nil where the local backend is none

	mu       sync.Mutex
	watchers []*watcher
}

type watcher struct {
	before func(off, n int64) error
	after  func(off, n int64)
}

// WatchInvalidate has before called when a range is about to be invalidated,
// which its error prevents, and after once it was. For who keeps copies of what
// it has read. The functions must not call Invalidate.
func (r *Region) WatchInvalidate(before func(off, n int64) error, after func(off, n int64)) (stop func()) {
	w := &watcher{before, after}
	v := &r.inval
	v.mu.Lock()
	defer v.mu.Unlock()
	v.watchers = append(v.watchers, w)
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.watchers = slices.DeleteFunc(slices.Clone(v.watchers), func(x *watcher) bool { return x == w })
	}
}

func (v *invalidator) watching() []*watcher {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.watchers
}

// Invalidate drops the local copy of all pages that hold any of n bytes at off:
// a read that begins after it has returned gets what the remote holds then.
// Writes are pushed first; a page that is written to meanwhile stays, since it
// is newer than the remote's. Reads that are under way get old bytes or new
// ones.
//
// A remote that tells generations can only be invalidated as a whole once
// somebody else has changed it, or the region would show a mix of two versions:
// a part gives memferry.ErrChanged. The whole takes the remote as it is now, also
// after an ErrChanged, unless there are writes that were not pushed before.
func (r *Region) Invalidate(ctx context.Context, off, n int64) error {
	if err := r.invalidate(ctx, off, n); err != nil {
		return fmt.Errorf("invalidate %d bytes at %d: %w", n, off, err)
	}
	return nil
}

func (r *Region) invalidate(ctx context.Context, off, n int64) error {
	if r.closed.Load() {
		return memferry.ErrClosed
	}
	if err := memferry.CheckRange("invalidate", off, n, r.size); err != nil || n == 0 {
		return err
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	r.inval.turn.Lock()
	defer r.inval.turn.Unlock()
	watchers := r.inval.watching()
	for _, w := range watchers {
		if err := w.before(off, n); err != nil {
			return err
		}
	}
	page, pages := pagesOf(off, n)
	whole := pages == r.pages
	tag, err := r.invalidGeneration(whole)
	if err != nil {
		return err
	}
	if !r.pushed(page, pages) {
		if err := r.pushAll(ctx); err != nil {
			return err
		}
	}
	for at, end := page, page+pages; at < end; {
		run := Run{Page: at, N: min(end-at, maxDropRun)}
		if err := r.drop(ctx, run); err != nil {
			return err
		}
		at = run.End()
	}
	if whole {
		if err := r.adoptGeneration(tag); err != nil {
			return err
		}
	}
	for _, w := range watchers {
		w.after(off, n)
	}
	return nil
}

// pushed reports whether the remote has all of the pages.
func (r *Region) pushed(page, n int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.table.Clean(page, n)
}

// invalidGeneration asks for the remote's generation, before anything is
// dropped: what comes later is at least that new.
func (r *Region) invalidGeneration(whole bool) (tag string, err error) {
	if r.gen.ask == nil {
		return "", nil
	}
	if !whole {
		r.checkGeneration()
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.changed != nil {
			return "", fmt.Errorf("only the whole can be, since the remote has changed: %w", r.changed)
		}
		return "", nil
	}
	if tag, err = r.askGeneration(); err != nil {
		return "", err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changed != nil && !r.table.Clean(0, r.pages) {
		return "", r.changed
	}
	return tag, nil
}

// adoptGeneration takes a remote whose old bytes are gone from here for the one
// that the region belongs to.
func (r *Region) adoptGeneration(tag string) error {
	if r.gen.ask == nil || tag == "" {
		return nil
	}
	if r.o.Store != nil {
		r.commitTurn <- struct{}{}
		defer func() { <-r.commitTurn }()
	}
	r.mu.Lock()
	own := r.gen.own && r.changed == nil
	r.mu.Unlock()
	if own {
		return nil // our own pushes may have changed it: settleGeneration adopts it
	}
	if r.o.Store != nil {
		if err := r.o.Store.SetGeneration(tag, false); err != nil {
			return fmt.Errorf("record the remote's generation: %w", err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gen.tag, r.gen.own, r.changed = tag, false, nil
	r.mapAgainLocked(0)
	r.pull.kick()
	r.push.kick()
	r.wakeAllLocked()
	return nil
}

// drop makes the clean pages of a run absent.
func (r *Region) drop(ctx context.Context, run Run) error {
	if r.o.Store != nil { // no commit may record as present what is being dropped
		r.commitTurn <- struct{}{}
		defer func() { <-r.commitTurn }()
	}
	if err := r.beginDrop(ctx, run); err != nil {
		return err
	}
	r.mu.Lock()
	taken := r.table.TakeDrop()
	r.drops.Add(1)
	if len(taken) > 0 && r.complete.Load() {
		r.complete.Store(false)
		r.done = make(chan struct{})
	}
	r.mu.Unlock()
	kept, recorded, err := r.forget(ctx, taken)
	r.endDrop(run, kept, recorded)
	return err
}

// beginDrop announces a drop, and waits until nothing is written to the pages.
// It counts as a write: Close waits for it.
func (r *Region) beginDrop(ctx context.Context, run Run) error {
	r.mu.Lock()
	if r.closed.Load() {
		r.mu.Unlock()
		return memferry.ErrClosed
	}
	r.writers++
	r.drops.Add(1)
	r.table.BeginDrop(run)
	for {
		busy := r.table.DropBusy()
		if busy < 0 {
			r.mu.Unlock()
			return nil
		}
		w := r.waiterLocked(busy)
		r.mu.Unlock()
		select {
		case <-w.ch: // local work, which always ends
		case <-ctx.Done():
			r.endDrop(run, nil, false)
			return context.Cause(ctx)
		}
		r.mu.Lock()
	}
}

// forget tells the store, and then the local backend, that pages are absent.
func (r *Region) forget(ctx context.Context, taken []Run) (kept []Run, recorded bool, err error) {
	if r.o.Store != nil && len(taken) > 0 {
		changes := make([]Change, len(taken))
		for i, t := range taken {
			changes[i] = Change{Page: t.Page, N: t.N, State: Absent}
		}
		if err := r.o.Store.Commit(changes); err != nil {
			err = fmt.Errorf("record the state of the cache: %w", localError(err))
			r.noteError(ErrorStore, err)
			return taken, false, err
		}
	}
	if r.inval.dropper == nil {
		return nil, true, nil
	}
	var errs []error
	for i, t := range taken {
		k, err := r.inval.dropper.Drop(ctx, t.Page, t.N)
		kept = append(kept, k...)
		if err != nil {
			errs = append(errs, err)
			kept = append(kept, taken[i+1:]...)
			break
		}
	}
	return kept, true, errors.Join(errs...)
}

// endDrop lets everything go on.
func (r *Region) endDrop(run Run, kept []Run, recorded bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.table.EndDrop(kept, recorded)
	r.noteComplete()
	if !r.complete.Load() {
		r.pull.rewind(run.Page)
		r.mapAgainLocked(run.Page)
		r.pull.kick()
	}
	r.writers--
	if r.writers == 0 {
		r.quiet.Broadcast()
	}
	r.wakeLocked(run.Page, run.N, nil)
}
