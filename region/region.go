// Package region is the engine of a managed mount: a remote backend made
// usable here at once, the rest of it pulled in the background, and writes
// pushed back.
//
// A [Region] joins two backends, a remote and a local one, through a table of
// pages (internal/chunk). Reads of what is local go to the local backend and
// take no lock; other reads fetch what they need, ahead of everything else.
// Whole-page writes go to the local backend alone. Two loops work behind:
// one pulls what is absent, following the readers, then the application's
// priorities, then in order; the other pushes what is dirty.
//
// # Locks
//
// One mutex guards the table, the streams and the statistics. It is never held
// across a call of a backend, the Store, or a function of the Options.
//
// # Failures
//
// Work in the background is retried for ever, with growing pauses, counted and
// shown in [Stats]. A read fails after Options.IOTimeout, a push by Push, Sync
// or Close likewise; what was not pushed stays dirty.
package region

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

const pageSize = memferry.PageSize

// Region is a remote backend and its local copy. It is a [memferry.Backend],
// can trim and write zeroes, knows extents, and reads and writes under a
// context. Its methods are safe for concurrent use.
type Region struct {
	o      Options
	remote endpoint
	local  endpoint
	size   int64
	pages  int64

	buffers *buffers

	table    *chunk.Table  // guarded by mu, but for Resident, NextAbsent and NextPresent
	complete atomic.Bool   // all pages are present: reads need not ask the table
	done     chan struct{} // closed with it, and replaced when it ends; guarded by mu
	drops    atomic.Int64  // moves when pages are about to become absent, and when they have
	closed   atomic.Bool

	ctx    context.Context // of everything that talks to the remote
	cancel context.CancelCauseFunc
	// patience ends when nobody waits for pushes any more, see Abandon.
	patience context.Context
	abandon  context.CancelCauseFunc
	wg       sync.WaitGroup // goroutines of the region

	closeOnce sync.Once
	closeErr  error

	commitTurn chan struct{} // full while a commit runs, which may take as long as a disk does
	commitWake chan struct{}

	mu      sync.Mutex
	quiet   *sync.Cond // writers == 0
	writers int        // local writes in progress
	waiters map[int64]*waiter
	count   counters
	pull    puller
	ahead   readAhead
	push    pusher
	gen     generation
	errs    [numErrorKinds]errorCount
	demands int   // requests of memferry.ClassDemand under way
	up      bool  // the remote answered last time
	changed error // sticky, see generation.go
	full    localFull
	inval   invalidator
}

// localFull remembers that the local medium had no room.
type localFull struct {
	until time.Time // no use trying before
}

// waiter is what readers and writers wait on for one word of pages.
type waiter struct {
	ch  chan struct{}
	err error // why the last fetch of the word failed
}

// Open joins remote and local into a region and takes ownership of both, and
// of the Store: they are closed by Close, or by Open itself when it fails.
// local must be at least as large as remote. Its content is trusted only as
// far as the Store says.
func Open(ctx context.Context, remote, local memferry.Backend, o Options) (*Region, error) {
	r, err := open(ctx, remote, local, o)
	if err != nil {
		errs := []error{fmt.Errorf("open region: %w", err), remote.Close(), local.Close()}
		if o.Store != nil {
			errs = append(errs, o.Store.Close())
		}
		return nil, errors.Join(errs...)
	}
	r.start()
	return r, nil
}

func open(ctx context.Context, remote, local memferry.Backend, o Options) (*Region, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	r := &Region{
		o: o, remote: newEndpoint(remote), local: newEndpoint(local), size: remote.Size(),
		done: make(chan struct{}), waiters: make(map[int64]*waiter), up: true,
		commitWake: make(chan struct{}, 1), commitTurn: make(chan struct{}, 1),
	}
	r.o.ReadOnly = o.ReadOnly || r.remote.can.ReadOnly
	r.quiet = sync.NewCond(&r.mu)
	if local.Size() < r.size {
		return nil, fmt.Errorf("local backend has %d bytes, remote %d: %w", local.Size(), r.size, memferry.ErrOutOfRange)
	}
	if r.remote, err = newBlocks(r.remote); err != nil {
		return nil, err
	}
	r.pages = (r.size + pageSize - 1) / pageSize
	r.table = chunk.New(r.pages, o.Store != nil)
	if o.Store != nil {
		if err := o.Store.Load(r.table.Load); err != nil {
			return nil, fmt.Errorf("load the cache: %w", err)
		}
	}
	if err := r.openGeneration(ctx); err != nil {
		return nil, err
	}
	if c := r.table.Counts(); r.o.ReadOnly && c.Dirty > 0 {
		return nil, fmt.Errorf("the cache holds %d bytes of writes to push: mount it once without --read-only: %w",
			r.bytes(c.Dirty), memferry.ErrReadOnly)
	}
	r.inval.dropper, _ = local.(Dropper)
	if err := r.openBuffers(); err != nil {
		return nil, err
	}
	r.initPull()
	r.initPush()
	r.ctx, r.cancel = context.WithCancelCause(context.Background())
	r.patience, r.abandon = context.WithCancelCause(r.ctx)
	return r, nil
}

// start begins the work in the background.
func (r *Region) start() {
	r.mu.Lock()
	r.noteComplete()
	r.mu.Unlock()
	r.spawn(r.pullLoop)
	if r.o.Pull != PullNone && r.remote.can.Extenter != nil && !r.complete.Load() {
		r.pull.mapping = true
		r.spawn(r.mapLoop)
	}
	if !r.o.ReadOnly {
		r.spawn(r.pushLoop)
	}
	if r.o.Store != nil {
		r.spawn(r.commitLoop)
	}
	if r.gen.ask != nil {
		r.spawn(r.generationLoop)
	}
}

func (r *Region) spawn(fn func()) {
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		fn()
	}()
}

// Close pushes what is dirty, within Options.IOTimeout, records the state of
// the cache, and closes the store and both backends. Calls that are waiting
// for the remote fail with ErrClosed. The error says what was not pushed, and
// what becomes of it.
func (r *Region) Close() error {
	r.closeOnce.Do(func() { r.closeErr = r.close() })
	return r.closeErr
}

// Abandon has Push, Sync and Close, also those under way, not wait for the
// remote any more: what is dirty stays in the cache, and is lost without one.
// Call Close afterwards; it says what was not pushed.
func (r *Region) Abandon() { r.abandon(errAbandoned) }

var errAbandoned = errors.New("given up")

func (r *Region) close() error {
	r.closed.Store(true)
	r.mu.Lock()
	r.wakeAllLocked()
	for r.writers > 0 {
		r.quiet.Wait()
	}
	r.mu.Unlock()

	var errs []error
	if !r.o.ReadOnly {
		errs = append(errs, r.finalPush())
	}
	r.cancel(memferry.ErrClosed)
	// A remote without contexts is unblocked by its Close.
	errs = append(errs, wrap("close the remote", r.remote.Close()))
	r.wg.Wait()
	errs = append(errs, r.buffers.close())
	if r.o.Store != nil {
		errs = append(errs, r.commit(), wrap("close the cache", r.o.Store.Close()))
	}
	errs = append(errs, wrap("close the local backend", r.local.Close()))
	return errors.Join(errs...)
}

// UnpushedError is what Close returns when the remote did not take all writes.
type UnpushedError struct {
	Bytes  int64
	Cached bool  // they stay in the cache; else they are lost
	Err    error // why
}

func (e *UnpushedError) Error() string {
	if e.Cached {
		return fmt.Sprintf("%d bytes were not pushed, and stay in the cache: %v", e.Bytes, e.Err)
	}
	return fmt.Sprintf("%d bytes of writes are lost: they could not be pushed, and there is no cache: %v", e.Bytes, e.Err)
}

// Unwrap returns why.
func (e *UnpushedError) Unwrap() error { return e.Err }

// finalSync bounds how long Close waits for a sync of the remote alone.
const finalSync = 5 * time.Second

// syncLeftovers has the remote make durable what an earlier process may have
// pushed to it without its cache having noted the pages: they show here, and
// must stay. Nothing of this session is at stake, so a remote that does not
// answer is no reason for Close to fail.
func (r *Region) syncLeftovers() {
	r.mu.Lock()
	synced := r.push.synced
	r.mu.Unlock()
	if r.o.Store == nil || synced {
		return
	}
	ctx, cancel := context.WithTimeout(r.patience, min(r.o.IOTimeout, finalSync))
	defer cancel()
	if err := r.pushAll(ctx); err != nil {
		r.noteError(ErrorSync, err)
	}
}

// finalPush pushes what is left, and names what could not be.
func (r *Region) finalPush() error {
	var err error
	if r.unpushed() > 0 {
		ctx, cancel := context.WithTimeoutCause(r.patience, r.o.IOTimeout,
			fmt.Errorf("the remote did not take it within %v: %w", r.o.IOTimeout, memferry.ErrTimeout))
		defer cancel()
		err = r.pushAll(ctx)
	}
	if err == nil {
		r.syncLeftovers()
	}
	if left := r.unpushed(); left > 0 {
		if err == nil {
			err = memferry.ErrTimeout
		}
		return &UnpushedError{Bytes: left, Cached: r.o.Store != nil, Err: err}
	}
	r.settleGeneration()
	return err
}

// unpushed returns how many bytes the remote has not safely got.
func (r *Region) unpushed() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.table.Counts()
	return r.bytes(c.Dirty + c.Pushing + c.Unsynced)
}

func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", op, err)
}

// Size returns the remote's size.
func (r *Region) Size() int64 { return r.size }

// ReadOnly reports whether writes are refused.
func (r *Region) ReadOnly() bool { return r.o.ReadOnly }

// LocalFile returns the file that holds the local copy, offset by offset, or
// nil. It belongs to the region. Only resident ranges of it are valid.
func (r *Region) LocalFile() *os.File {
	if r.local.can.Filer == nil {
		return nil
	}
	return r.local.can.Filer.File()
}

// Complete reports whether everything is local.
func (r *Region) Complete() bool { return r.complete.Load() }

// Done is closed once everything is local. Another one is after Invalidate.
func (r *Region) Done() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.done
}

// noteComplete notices that everything is local.
func (r *Region) noteComplete() {
	if r.table.Complete() && !r.complete.Load() {
		r.complete.Store(true)
		close(r.done)
	}
}

// bytes converts a number of pages; the last one may be short.
func (r *Region) bytes(pages int64) int64 { return min(pages*pageSize, r.size) }

// span returns the bytes of a run of pages.
func (r *Region) span(page, n int64) (off, length int64) {
	off = page * pageSize
	return off, min(n*pageSize, r.size-off)
}

// pagesOf returns the pages that hold any of n bytes at off.
func pagesOf(off, n int64) (page, pages int64) {
	page = off / pageSize
	return page, (off+n+pageSize-1)/pageSize - page
}

// waitWord is how many pages share a waiter.
const waitWord = 64

// waiterLocked returns the waiter for a page's word.
func (r *Region) waiterLocked(page int64) *waiter {
	w := r.waiters[page/waitWord]
	if w == nil {
		w = &waiter{ch: make(chan struct{})}
		r.waiters[page/waitWord] = w
	}
	return w
}

// wakeLocked wakes whoever waits for one of the pages. err, if any, is why
// they were not fetched.
func (r *Region) wakeLocked(page, n int64, err error) {
	if len(r.waiters) == 0 || n == 0 {
		return
	}
	first, last := page/waitWord, (page+n-1)/waitWord
	if last-first >= int64(len(r.waiters)) {
		for w, v := range r.waiters {
			if w >= first && w <= last {
				r.wakeWaiter(w, v, err)
			}
		}
		return
	}
	for w := first; w <= last; w++ {
		if v := r.waiters[w]; v != nil {
			r.wakeWaiter(w, v, err)
		}
	}
}

func (r *Region) wakeWaiter(w int64, v *waiter, err error) {
	v.err = err
	close(v.ch)
	delete(r.waiters, w)
}

func (r *Region) wakeAllLocked() {
	for w, v := range r.waiters {
		r.wakeWaiter(w, v, nil)
	}
}

// limiter returns the bound on background pulls, nil if there is none.
func limiter(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond == 0 {
		return nil
	}
	burst := min(max(bytesPerSecond/10, 64<<10), 16<<20)
	return rate.NewLimiter(rate.Limit(bytesPerSecond), int(burst))
}
