package region

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

const (
	minPushPause = 100 * time.Millisecond
	maxPushPause = 5 * time.Second
)

// pusher decides when dirty pages are sent. The region's mutex guards it.
type pusher struct {
	pace     *pacer
	requests int
	wake     chan struct{} // of the loop
	moved    chan struct{} // a request has ended

	firstDirty time.Time // oldest write that no round has begun to push
	lastWrite  time.Time
	synced     bool         // the remote was synced once: what a crash left unsynced there is safe
	callers    []chan error // of Push, until a round that began after them ends

	pause time.Duration // after failures
	hold  time.Time     // no round before
}

func (r *Region) initPush() {
	limit := int64(maxWindow)
	if r.copiesPushes() {
		limit = r.buffered()
	}
	r.push = pusher{pace: newPacer(minPushWindow, limit), wake: make(chan struct{}, 1), moved: make(chan struct{}, 1)}
	if r.table.Counts().Dirty > 0 {
		r.push.wrote(time.Now())
	}
}

func (u *pusher) kick() {
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

func (u *pusher) wrote(now time.Time) {
	u.lastWrite = now
	if u.firstDirty.IsZero() {
		u.firstDirty = now
		u.kick()
	}
}

// pushLoop runs rounds for as long as the region lives.
func (r *Region) pushLoop() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		wait, due := r.pushDue(time.Now())
		if due {
			r.pushRound()
			continue
		}
		if wait > 0 {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
		select {
		case <-r.push.wake:
		case <-timer.C:
		case <-r.ctx.Done():
			r.mu.Lock()
			r.answerPushLocked(memferry.ErrClosed)
			r.mu.Unlock()
			return
		}
	}
}

// pushDue tells whether a round should begin, else when to look again.
func (r *Region) pushDue(now time.Time) (wait time.Duration, due bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := &r.push
	if r.changed != nil {
		r.answerPushLocked(r.changed)
		return 0, false
	}
	if d := u.hold.Sub(now); d > 0 {
		return d, false
	}
	c := r.table.Counts()
	if len(u.callers) > 0 {
		return 0, true
	}
	if c.Dirty == 0 || u.firstDirty.IsZero() {
		return 0, false
	}
	if r.o.PushBacklog > 0 && c.Dirty*pageSize >= r.o.PushBacklog {
		return 0, true
	}
	var at time.Time
	if r.o.PushInterval > 0 {
		at = u.firstDirty.Add(r.o.PushInterval)
	}
	if r.o.PushIdle > 0 {
		at = earlier(at, u.lastWrite.Add(r.o.PushIdle))
	}
	if at.IsZero() {
		return 0, false
	}
	return at.Sub(now), !now.Before(at)
}

func (r *Region) answerPushLocked(err error) {
	for _, c := range r.push.callers {
		c <- err
	}
	r.push.callers = nil
}

// pushRound sends every page that is dirty, once, and has the remote sync
// them. What fails stays dirty for a later round.
func (r *Region) pushRound() {
	r.mu.Lock()
	callers := r.push.callers
	r.push.callers, r.push.firstDirty = nil, time.Time{}
	r.mu.Unlock()

	err := r.beginPushGeneration()
	if err == nil {
		// What was accepted before a failure is synced; but a remote that does
		// not answer is not asked to.
		if err = r.sendDirty(); !timedOut(err) {
			err = errors.Join(err, r.syncRemote())
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gen.active = false
	u := &r.push
	if err == nil {
		u.pause = 0
		r.remoteUpLocked()
	} else if r.ctx.Err() == nil {
		u.pause = min(max(2*u.pause, minPushPause), maxPushPause)
		u.hold = time.Now().Add(u.pause)
		r.remoteFailedLocked(err)
	}
	if r.table.Counts().Dirty > 0 && u.firstDirty.IsZero() {
		u.firstDirty = time.Now()
	}
	for _, c := range callers {
		c <- err
	}
}

// sendDirty sends dirty pages in ascending order until none is left or one
// failed, and waits for the answers.
func (r *Region) sendDirty() error {
	var wg sync.WaitGroup
	var first error // guarded by mu
	for page := int64(0); ; {
		run, f, ok := r.nextPush(page, &first)
		if !ok {
			break
		}
		page = run.End()
		wg.Add(1)
		r.spawn(func() {
			defer wg.Done()
			err := r.pushRun(run, &f)
			if err != nil {
				r.mu.Lock()
				if first == nil {
					first = err
				}
				r.mu.Unlock()
			}
		})
	}
	wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return first
}

// nextPush waits for room and picks the next pages to send. A round that may
// not go on has failed: its callers must not take what is left for pushed.
func (r *Region) nextPush(page int64, failed *error) (chunk.Run, flight, bool) {
	u := &r.push
	for {
		r.mu.Lock()
		if *failed == nil {
			*failed = r.stoppedLocked()
		}
		if *failed != nil {
			r.mu.Unlock()
			return chunk.Run{}, flight{}, false
		}
		n := requestBytes(u.pace, r.o.ChunkSize)
		if u.requests < maxRequests && u.pace.room(n) {
			run := r.table.BeginPush(page, n/pageSize)
			var f flight
			if run.N > 0 {
				// Counted here, not where it is sent: what bounds memory must
				// not lag behind.
				_, length := r.span(run.Page, run.N)
				f = u.pace.send(time.Now(), length)
				u.requests++
			}
			r.mu.Unlock()
			return run, f, run.N > 0
		}
		r.mu.Unlock()
		select {
		case <-u.moved:
		case <-r.ctx.Done():
		}
	}
}

// stoppedLocked returns why nothing may be sent any more.
func (r *Region) stoppedLocked() error {
	if r.changed == nil && r.ctx.Err() != nil {
		return memferry.ErrClosed
	}
	return r.changed
}

// pushRun sends one run of pages, which are marked as pushing.
func (r *Region) pushRun(run chunk.Run, f *flight) error {
	off, n := r.span(run.Page, run.N)
	ctx, cancel := context.WithTimeout(memferry.WithClass(r.ctx, memferry.ClassBackground), r.o.IOTimeout)
	defer cancel()
	err := r.sendRange(ctx, off, n)
	if err != nil {
		err = fmt.Errorf("push %d bytes at %d: %w", n, off, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.table.EndPush(run, err == nil)
	if err == nil {
		r.push.pace.deliver(time.Now(), f, n)
		r.count.pushed += n
	} else if r.ctx.Err() == nil {
		r.errorLocked(ErrorPush, err)
	}
	r.push.pace.end(f)
	r.push.requests--
	select {
	case r.push.moved <- struct{}{}:
	default:
	}
	return err
}

// sendRange sends local bytes, as zeroes where they are known to be.
func (r *Region) sendRange(ctx context.Context, off, n int64) error {
	for end := off + n; off < end; {
		k, zero := r.kind(ctx, off, end-off)
		var err error
		switch {
		case zero:
			err = r.remote.can.ZeroWriter.WriteZeroes(off, k, 0)
			if errors.Is(err, memferry.ErrNotSupported) {
				err = r.remote.zero(ctx, off, k, 0)
			}
		case r.local.can.Viewer != nil:
			err = r.sendView(ctx, off, k)
		default:
			err = r.sendCopy(ctx, off, k)
		}
		if err != nil {
			return err
		}
		off += k
	}
	return nil
}

// kind returns how many bytes from off on are alike, and whether they are
// zeroes that the remote can be asked to write.
func (r *Region) kind(ctx context.Context, off, n int64) (int64, bool) {
	if r.remote.can.ZeroWriter == nil || r.local.can.Extenter == nil {
		return n, false
	}
	e, err := r.local.can.Extenter.Extents(ctx, off, n)
	if err != nil || len(e) == 0 || e[0].Len <= 0 || e[0].Len > n {
		return n, false
	}
	k, zero := e[0].Len, e[0].Flags&memferry.ExtentZero != 0
	for _, x := range e[1:] {
		if (x.Flags&memferry.ExtentZero != 0) != zero || x.Len <= 0 || x.Len > n-k {
			break
		}
		k += x.Len
	}
	return k, zero
}

func (r *Region) sendView(ctx context.Context, off, n int64) error {
	p, err := r.local.can.Viewer.View(off, n)
	if err != nil {
		return fmt.Errorf("read local copy: %w", err)
	}
	defer r.local.can.Viewer.ReleaseView()
	_, err = r.remote.write(ctx, p, off)
	return err
}

// sendCopy sends from a buffer; maxBuffered bounds how many are in use.
func (r *Region) sendCopy(ctx context.Context, off, n int64) error {
	b := r.buffers.get(n)
	defer r.buffers.put(b)
	if err := r.local.read(ctx, b.p, off); err != nil {
		return fmt.Errorf("read local copy: %w", err)
	}
	_, err := r.remote.write(ctx, b.p, off)
	return err
}

// syncRemote makes what was pushed durable at the remote. If it can't say that
// it is, all of it has to be pushed again.
func (r *Region) syncRemote() error {
	r.mu.Lock()
	need := r.table.Counts().Unsynced > 0 || !r.push.synced
	r.mu.Unlock()
	if !need {
		return nil
	}
	err := r.remote.Sync()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.table.Synced(err == nil)
	if err == nil {
		r.push.synced = true
		r.kickCommit()
		return nil
	}
	err = fmt.Errorf("sync the remote: %w", err)
	if r.ctx.Err() == nil {
		r.errorLocked(ErrorSync, err)
	}
	return err
}

// Push returns nil once everything that was dirty when it was called has been
// accepted and synced by the remote. It fails when the remote refuses, or does
// not answer for Options.IOTimeout; what was not pushed stays dirty.
func (r *Region) Push(ctx context.Context) error {
	if r.closed.Load() {
		return memferry.ErrClosed
	}
	if r.o.ReadOnly {
		return nil
	}
	return r.pushAll(ctx)
}

func (r *Region) pushAll(ctx context.Context) error {
	var since time.Time // of the first failure
	var last error
	for failures := 0; ; {
		began := time.Now()
		done, err := r.awaitRound(ctx)
		if err == nil {
			return nil
		}
		if done {
			if last != nil {
				err = fmt.Errorf("%w (last: %w)", err, last)
			}
			return err
		}
		last = err
		if failures++; !transient(err) && failures >= definiteAttempts || errors.Is(err, memferry.ErrChanged) {
			return err
		}
		if since.IsZero() {
			since = time.Now()
			if timedOut(err) { // it has not answered since then, or for IOTimeout
				since = began
			}
		}
		if time.Since(since) >= r.o.IOTimeout {
			return err
		}
	}
}

// awaitRound has a round begin and returns its error; done means that the
// caller must not ask again.
func (r *Region) awaitRound(ctx context.Context) (done bool, err error) {
	c := make(chan error, 1)
	r.mu.Lock()
	switch {
	case r.ctx.Err() != nil:
		err, done = memferry.ErrClosed, true
	case r.changed != nil:
		err, done = r.changed, true
	default:
		r.push.callers = append(r.push.callers, c)
		// Somebody waits: the pause after failures in the background is too long.
		if soon := time.Now().Add(minPushPause); r.push.hold.After(soon) {
			r.push.hold = soon
		}
		r.push.kick()
	}
	r.mu.Unlock()
	if done {
		return true, err
	}
	select {
	case err := <-c:
		return false, err
	case <-ctx.Done():
		return true, fmt.Errorf("push: %w", context.Cause(ctx))
	case <-r.patience.Done():
		return true, fmt.Errorf("push: %w", context.Cause(r.patience))
	case <-r.ctx.Done():
		return true, memferry.ErrClosed
	}
}
