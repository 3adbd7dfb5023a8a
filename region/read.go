package region

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

const (
	// demandUnit is what a fault brings in at least: a few pages more cost no
	// round trip.
	demandUnit = 16 // pages

	// maxDemandSpan bounds how much of one read is fetched at once. The
	// read-ahead brings the rest meanwhile.
	maxDemandSpan = 4 << 20

	// smallRead is a read that is worth a second request where the first will
	// take longer than a round trip: random access. What is larger, or
	// sequential, is limited by bandwidth, and duplicates would only cost.
	smallRead = 128 << 10

	// unknownAhead is how much may be in flight ahead of a request, while the
	// link is still unknown, for it to be worth waiting for.
	unknownAhead = 1 << 20

	// unknownDue is how long it is then waited for.
	unknownDue = 30 * time.Millisecond

	// minLate is how late a request may be before it is duplicated.
	minLate = 2 * time.Millisecond

	// demandLate is how late a demand request may be before it is sent again.
	demandLate = 5 * time.Second

	// definiteAttempts is how often a request is tried whose failure is the
	// remote's answer, not the link's.
	definiteAttempts = 3

	minRetry = 10 * time.Millisecond
	maxRetry = time.Second
)

// ReadAt reads, and fetches what is absent. See [memferry.Backend].
func (r *Region) ReadAt(p []byte, off int64) (int, error) {
	return r.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext is ReadAt that stops waiting for the remote when ctx is done.
func (r *Region) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	for {
		drops := r.drops.Load()
		n, err := r.readAt(ctx, p, off)
		if !errors.Is(err, errLocalRead) {
			return n, err
		}
		// It may have been invalidated since it was found to be here.
		if r.drops.Load() == drops {
			r.noteError(ErrorLocal, err)
			return n, err
		}
	}
}

// errLocalRead marks errors of reads of the local copy.
var errLocalRead = errors.New("read local copy")

func (r *Region) readAt(ctx context.Context, p []byte, off int64) (int, error) {
	if r.closed.Load() {
		return 0, memferry.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	n, eof := memferry.CheckRead(off, len(p), r.size)
	if n == 0 {
		return 0, eof
	}
	if !r.complete.Load() {
		page, pages := pagesOf(off, int64(n))
		resident := r.table.Resident(page, pages)
		r.follow(page, pages, resident)
		if !resident {
			k, err := r.readSlow(ctx, p[:n], off)
			if err != nil {
				return k, err
			}
			return k, eof
		}
	}
	k, err := r.readLocal(p[:n], off)
	if err != nil {
		return k, err
	}
	return k, eof
}

// readLocal reads resident bytes.
func (r *Region) readLocal(p []byte, off int64) (int, error) {
	n, err := r.local.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if r.closed.Load() {
		return n, memferry.ErrClosed
	}
	return n, fmt.Errorf("%w: %w", errLocalRead, err)
}

// readSlow reads where something is absent.
func (r *Region) readSlow(ctx context.Context, p []byte, off int64) (int, error) {
	r.mu.Lock()
	r.count.demandWaits++
	r.mu.Unlock()
	w := newWait(ctx, r.o.IOTimeout)
	for done := 0; done < len(p); {
		q := p[done:min(len(p), done+maxDemandSpan)]
		at := off + int64(done)
		page, pages := pagesOf(at, int64(len(q)))
		err := r.ensure(w, page, pages)
		var n int
		if err == nil {
			n, err = r.readLocal(q, at)
		} else if errors.Is(err, errLanding) {
			n, err = r.readThrough(w, q, at)
		}
		done += n
		if err != nil {
			return done, err
		}
	}
	return len(p), nil
}

// wait is the patience of one call.
type wait struct {
	ctx      context.Context
	timeout  time.Duration
	deadline time.Time
	failures int   // in a row
	last     error // of them
}

func newWait(ctx context.Context, timeout time.Duration) *wait {
	return &wait{ctx: ctx, timeout: timeout, deadline: time.Now().Add(timeout)}
}

// on waits for ch, or until the given time if that is not zero. Its error ends
// the call.
func (w *wait) on(ctx context.Context, ch <-chan struct{}, until time.Time) error {
	now := time.Now()
	if !now.Before(w.deadline) {
		return w.expired()
	}
	if until.IsZero() || until.After(w.deadline) {
		until = w.deadline
	}
	t := time.NewTimer(until.Sub(now))
	defer t.Stop()
	select {
	case <-ch:
	case <-t.C:
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	case <-ctx.Done():
		return memferry.ErrClosed
	}
	return nil
}

func (w *wait) expired() error {
	err := fmt.Errorf("no answer from the remote within %v: %w", w.timeout, memferry.ErrTimeout)
	if w.last != nil {
		err = fmt.Errorf("%w (last: %w)", err, w.last)
	}
	return err
}

// failed takes note of a failed attempt, and pauses before the next one. Its
// error ends the call.
func (w *wait) failed(ctx context.Context, err error) error {
	w.failures++
	w.last = err
	if errors.Is(err, errLanding) || errors.Is(err, memferry.ErrChanged) {
		return err
	}
	if !transient(err) && w.failures >= definiteAttempts {
		return err
	}
	return w.on(ctx, nil, time.Now().Add(min(minRetry<<min(w.failures-1, 10), maxRetry)))
}

// ensure makes pages present.
func (r *Region) ensure(w *wait, page, n int64) error {
	end := page + n
	var failed error
	for {
		r.mu.Lock()
		page = r.table.NextAbsent(page, end)
		if page == end {
			r.mu.Unlock()
			return nil
		}
		if err := r.refusedLocked(); err != nil {
			r.mu.Unlock()
			return err
		}
		if failed != nil && r.table.State(page) == chunk.StateAbsent {
			r.mu.Unlock()
			if err := w.failed(r.ctx, failed); err != nil {
				return err
			}
			failed = nil
			continue
		}
		recheck := r.demandLocked(page, end)
		wt := r.waiterLocked(page)
		r.mu.Unlock()
		if err := w.on(r.ctx, wt.ch, recheck); err != nil {
			return err
		}
		// err is written before ch is closed, under the lock.
		r.mu.Lock()
		failed = wt.err
		r.mu.Unlock()
	}
}

// refusedLocked returns why the remote may not be asked.
func (r *Region) refusedLocked() error {
	if r.closed.Load() {
		return memferry.ErrClosed
	}
	if r.changed != nil {
		return r.changed
	}
	if time.Now().Before(r.full.until) {
		return fmt.Errorf("%w: %w", errLanding, memferry.ErrNoSpace)
	}
	return nil
}

// demandLocked asks for the absent pages of [page, end), and again for those
// that are asked for already but will come late. It returns when to look
// again, zero if that is not needed.
func (r *Region) demandLocked(page, end int64) time.Time {
	lo, hi := page, end
	if r.o.Pull != PullNone {
		lo = page &^ (demandUnit - 1)
		hi = min((end+demandUnit-1)&^(demandUnit-1), r.pages)
	}
	now := time.Now()
	small := end-page <= smallRead/pageSize && !r.ahead.sequential(page)
	var recheck time.Time
	for lo < hi {
		lo = r.table.NextAbsent(lo, hi)
		stop := min(r.table.NextPresent(lo, hi), lo+maxFetch/pageSize)
		if lo == stop {
			break
		}
		if c := r.table.Claim(lo, stop-lo, false); c != nil {
			r.launchLocked(c, memferry.ClassDemand)
		}
		if a, b := max(lo, page), min(stop, end); a < b {
			recheck = earlier(recheck, r.hurryLocked(now, a, b, small))
		}
		lo = stop
	}
	return recheck
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// hurryLocked looks at absent pages that were asked for before, and asks again
// where that would be faster: whichever answer comes first is used.
func (r *Region) hurryLocked(now time.Time, page, end int64, small bool) time.Time {
	var recheck time.Time
	late := int64(-1) // start of the pages to ask for again
	for p := page; p < end; {
		next := min(end, (p/waitWord+1)*waitWord)
		when, dup := r.expectLocked(now, p, small)
		if dup && late < 0 {
			late = p
		}
		if late >= 0 && (!dup || next == end) {
			stop := p
			if dup {
				stop = next
			}
			if c := r.table.Claim(late, stop-late, true); c != nil {
				r.launchLocked(c, memferry.ClassDemand)
				when = now.Add(demandLate)
			}
			late = -1
		}
		recheck = earlier(recheck, when)
		p = next
	}
	return recheck
}

// expectLocked tells whether the requests for a page will come late, and if
// not, when to look again.
func (r *Region) expectLocked(now time.Time, page int64, small bool) (recheck time.Time, late bool) {
	rtt := r.pull.pace.rtt
	slack := max(rtt/8, minLate)
	best := time.Time{}
	for _, f := range r.table.Fetches(page) {
		if !f.Wants(page) {
			continue
		}
		q, _ := f.Owner.(*request)
		if q == nil {
			continue
		}
		switch {
		case q.class == memferry.ClassDemand:
			best = earlier(best, q.sent.Add(demandLate))
		case !q.due.IsZero():
			best = earlier(best, q.due.Add(slack))
		case q.ahead <= unknownAhead:
			best = earlier(best, q.sent.Add(unknownDue))
		}
		if q.class == memferry.ClassDemand && now.Before(q.sent.Add(demandLate)) {
			return q.sent.Add(demandLate), false
		}
	}
	if best.IsZero() {
		// Nothing is known of when it comes; if no request has the page, it is
		// landing or being written, and will be here soon.
		return time.Time{}, r.table.State(page) == chunk.StateFetching
	}
	if !now.Before(best) {
		return time.Time{}, true
	}
	patience := rtt + slack
	if small {
		patience = rtt/3 + slack
	}
	return best, rtt > 0 && best.Sub(now) > patience+slack
}

// readThrough reads what is absent straight from the remote, because the local
// medium has no room for it.
func (r *Region) readThrough(w *wait, p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		at := off + int64(done)
		page := at / pageSize
		end := (off + int64(len(p)) + pageSize - 1) / pageSize
		next := r.table.NextPresent(page, end)
		here := next == page
		if here {
			next = r.table.NextAbsent(page, end)
		}
		q := p[done:min(int64(len(p)), next*pageSize-off)]
		var err error
		if here {
			_, err = r.readLocal(q, at)
		} else {
			err = r.readRemote(w, q, at)
		}
		if err != nil {
			return done, err
		}
		done += len(q)
	}
	return len(p), nil
}

func (r *Region) readRemote(w *wait, p []byte, off int64) error {
	for {
		r.mu.Lock()
		err := r.changed
		r.count.demandReads++
		r.mu.Unlock()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithDeadline(memferry.WithClass(w.ctx, memferry.ClassDemand), w.deadline)
		err = r.remote.read(ctx, p, off)
		cancel()
		if err == nil {
			return nil
		}
		if r.closed.Load() {
			return memferry.ErrClosed
		}
		r.noteError(ErrorDemand, err)
		if err := w.failed(r.ctx, err); err != nil {
			return err
		}
	}
}

// Resident reports whether a read of n bytes at off needs no remote.
func (r *Region) Resident(off, n int64) bool {
	if memferry.CheckRange("resident", off, n, r.size) != nil || r.closed.Load() {
		return false
	}
	if n == 0 || r.complete.Load() {
		return true
	}
	page, pages := pagesOf(off, n)
	return r.table.Resident(page, pages)
}

// View returns the n bytes at off for reading, without a copy, or false where
// they are not all resident or the local backend is not memory. The caller
// must call ReleaseView once after true. Concurrent writes show in the view.
func (r *Region) View(off, n int64) ([]byte, bool) {
	if r.local.can.Viewer == nil || n == 0 || !r.Resident(off, n) {
		return nil, false
	}
	if !r.complete.Load() {
		page, pages := pagesOf(off, n)
		r.follow(page, pages, true)
	}
	p, err := r.local.can.Viewer.View(off, n)
	if err != nil {
		return nil, false
	}
	return p, true
}

// ReleaseView ends the use of one view.
func (r *Region) ReleaseView() { r.local.can.Viewer.ReleaseView() }
