package region

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/memferry/memferry"
)

const (
	// maxZeroRun bounds how much is settled as zero in one step, in pages: a
	// write to it waits that long.
	maxZeroRun = 16 << 30 / pageSize

	// mapAttempts is how often a search for holes is tried before the pull does
	// without.
	mapAttempts = 5
)

// mapLoop walks over the remote's extents and settles its zeroes without a
// transfer. Where it is slower than the pull it skips what has arrived.
func (r *Region) mapLoop() {
	failures := 0
	for page := int64(0); ; {
		r.mu.Lock()
		if r.pull.remap {
			r.pull.remap, page = false, 0
		}
		page = r.table.NextAbsent(page, r.pages)
		r.pull.mapped = page
		r.pull.kick()
		stop := r.changed != nil || r.ctx.Err() != nil
		r.pull.mapping = page < r.pages && !stop
		r.mu.Unlock()
		if page == r.pages || stop {
			return
		}
		next, err := r.mapSome(page)
		if err == nil {
			failures, page = 0, next
			continue
		}
		if r.ctx.Err() != nil {
			return
		}
		r.noteError(ErrorPull, fmt.Errorf("look for holes at %d: %w", page*pageSize, err))
		if failures++; failures >= mapAttempts {
			break
		}
		sleep(r.ctx, min(minPullPause<<failures, maxPullPause))
	}
	r.mu.Lock()
	r.pull.mapped, r.pull.mapping, r.pull.remap = r.pages, false, false // all of it is pulled, then
	r.pull.kick()
	r.mu.Unlock()
}

// mapAgainLocked has pages from page on, which have become absent, searched for
// holes.
func (r *Region) mapAgainLocked(page int64) {
	if r.o.Pull == PullNone || r.remote.can.Extenter == nil || r.ctx.Err() != nil {
		return
	}
	r.pull.mapped = min(r.pull.mapped, page)
	if r.pull.mapping {
		r.pull.remap = true
		return
	}
	r.pull.mapping = true
	r.spawn(r.mapLoop)
}

// errMapStale is about extents that were asked for before an Invalidate.
var errMapStale = errors.New("the extents may be out of date")

// mapSome asks for extents from page on, and returns the page after the last
// one that they tell of.
func (r *Region) mapSome(page int64) (int64, error) {
	ctx, cancel := context.WithTimeout(memferry.WithClass(r.ctx, memferry.ClassReadAhead), r.o.IOTimeout)
	defer cancel()
	off, drops := page*pageSize, r.drops.Load()
	extents, err := r.remote.can.Extenter.Extents(ctx, off, r.size-off)
	if err != nil {
		return page, err
	}
	at := off
	for i := 0; i < len(extents); {
		if extents[i].Off != at || extents[i].Len <= 0 || extents[i].Len > r.size-at {
			return page, fmt.Errorf("extent of %d bytes at %d, expected one at %d: %w", extents[i].Len, extents[i].Off, at, memferry.ErrOutOfRange)
		}
		// Neighbours that are zero, for whatever reason, are one run.
		start, zero := at, extents[i].Flags&memferry.ExtentZero != 0
		for i < len(extents) && (extents[i].Flags&memferry.ExtentZero != 0) == zero && extents[i].Off == at && extents[i].Len > 0 && extents[i].Len <= r.size-at {
			at += extents[i].Len
			i++
		}
		if zero {
			if err := r.settleZero(start, at, drops); errors.Is(err, errMapStale) {
				return page, nil
			} else if err != nil {
				return page, err
			}
		}
	}
	next := at / pageSize
	if at == r.size {
		next = r.pages
	}
	if next == page { // less than a page is known: fetch it
		next++
	}
	return next, nil
}

// settleZero makes the absent whole pages of [off, end) present as zero.
func (r *Region) settleZero(off, end, drops int64) error {
	page, last := (off+pageSize-1)/pageSize, end/pageSize
	if end == r.size {
		last = r.pages
	}
	for page < last {
		r.mu.Lock()
		if r.drops.Load() != drops {
			r.mu.Unlock()
			return errMapStale
		}
		run := r.table.BeginZero(page, min(last-page, maxZeroRun))
		r.mu.Unlock()
		if run.N == 0 {
			page = min(last, page+maxZeroRun)
			continue
		}
		at, n := r.span(run.Page, run.N)
		err := r.local.zero(context.Background(), at, n, 0)
		r.mu.Lock()
		r.table.EndZero(run, err == nil)
		if err == nil {
			r.count.skipped += n
			r.noteComplete()
		}
		r.wakeLocked(run.Page, run.N, nil)
		r.mu.Unlock()
		if err != nil {
			return fmt.Errorf("%w: %w", errLanding, localError(err))
		}
		page = run.End()
	}
	return nil
}

// sleep waits, or until ctx is done.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// Extents describes what is local from the local backend, and the rest as the
// remote does, or as data. See [memferry.Extenter].
func (r *Region) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	if r.closed.Load() {
		return nil, memferry.ErrClosed
	}
	if err := memferry.CheckRange("extents", off, n, r.size); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, fmt.Errorf("extents of 0 bytes at %d: %w", off, memferry.ErrOutOfRange)
	}
	page, end := off/pageSize, (off+n+pageSize-1)/pageSize
	from, next := r.local, r.table.NextAbsent(page, end)
	if next == page {
		from, next = r.remote, r.table.NextPresent(page, end)
	}
	n = min(n, next*pageSize-off)
	if from.can.Extenter == nil {
		return []memferry.Extent{{Off: off, Len: n}}, nil
	}
	return from.can.Extenter.Extents(ctx, off, n)
}
