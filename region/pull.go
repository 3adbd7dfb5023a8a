package region

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

const (
	// maxRequests bounds background requests in flight, each of which has a
	// goroutine.
	maxRequests = 1024

	// minFetch is the smallest background request worth its overhead, and
	// windowParts into how many the window is divided: enough for pieces to
	// arrive steadily.
	minFetch = 64 << 10
	// They are never fewer than minParts: one at a time would never find out
	// that the link carries more.
	windowParts = 16
	minParts    = 4

	// maxBuffered bounds the memory of background pulls from a remote that
	// can't stream, and of pushes from a local side that is no memory. With
	// what a frontend holds it fits into the 64 MiB that a mount may take.
	maxBuffered = 16 << 20

	// priorityBatch bounds how many chunks are ranked at once. What is ranked
	// lower waits for the next pass over the region.
	priorityBatch = 64 << 10

	minPullPause = 100 * time.Millisecond
	maxPullPause = 5 * time.Second
)

// puller decides what is fetched in the background. The region's mutex guards
// it.
type puller struct {
	pace     *pacer
	requests int // in flight
	limit    *rate.Limiter
	wake     chan struct{}

	full bool // fetch everything, not only ahead of readers

	seq            int64 // where the sequential rest goes on
	mapping, remap bool  // a search for holes is under way; it has to begin again
	mapped         int64 // pages before this one were asked for holes; all, without such a search
	again          bool  // something behind seq or in a past batch has to be fetched again

	// ranked holds the chunks that come next by the application's priority.
	ranked   []int64
	rankDone bool // all that is absent was ranked, and nothing came back since

	pause time.Duration // after failures
	hold  time.Time     // no request before
}

func (r *Region) initPull() {
	limit := int64(maxWindow)
	if r.copiesPulls() {
		limit = r.buffered()
	}
	r.pull = puller{
		pace: newPacer(minWindow, limit), limit: limiter(r.o.Rate), wake: make(chan struct{}, 1),
		full: r.o.Pull == PullFull, mapped: r.pages,
	}
	if r.remote.can.Extenter != nil && r.o.Pull != PullNone {
		r.pull.mapped = 0
	}
}

func (r *Region) copiesPulls() bool { return r.remote.can.StreamReader == nil }

func (r *Region) copiesPushes() bool { return r.local.can.Viewer == nil && !r.o.ReadOnly }

// buffered is each direction's share of maxBuffered, where it copies.
func (r *Region) buffered() int64 {
	if r.copiesPulls() && r.copiesPushes() {
		return maxBuffered / 2
	}
	return maxBuffered
}

// openBuffers makes room for what will be copied.
func (r *Region) openBuffers() error {
	size := int64(0)
	if r.copiesPulls() || r.copiesPushes() {
		size = maxBuffered
	}
	var err error
	r.buffers, err = newBuffers(size)
	return err
}

func (u *puller) kick() {
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

// rewind makes the puller look again at pages from page on.
func (u *puller) rewind(page int64) {
	u.seq = min(u.seq, page)
	u.again = true
}

func (u *puller) failedLocked(now time.Time) {
	if now.Before(u.hold) {
		return // one of many that failed together
	}
	u.pause = min(max(2*u.pause, minPullPause), maxPullPause)
	u.hold = now.Add(u.pause)
}

func (u *puller) recoveredLocked() { u.pause, u.hold = 0, time.Time{} }

// requestBytes returns how long the next request of a pacer's should be: a
// chunk, but so that several are in flight, and not too many.
func requestBytes(p *pacer, chunkSize int64) int64 {
	n := min(max(chunkSize, p.window/windowParts), p.window/minParts)
	return min(max(n&^(pageSize-1), minFetch), maxFetch)
}

// pullLoop sends background requests for as long as the region lives.
func (r *Region) pullLoop() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		next := r.pullSome()
		if next > 0 {
			timer.Reset(next)
		} else {
			timer.Stop()
		}
		select {
		case <-r.pull.wake:
		case <-timer.C:
		case <-r.ctx.Done():
			return
		}
	}
}

// pullSome sends what may be sent now, and returns how long to wait for more if
// nothing else wakes the loop.
func (r *Region) pullSome() time.Duration {
	for {
		if r.needRank() {
			r.rank()
		}
		r.mu.Lock()
		more, wait := r.pullOneLocked(time.Now())
		r.mu.Unlock()
		if !more {
			return wait
		}
	}
}

func (r *Region) pullOneLocked(now time.Time) (more bool, wait time.Duration) {
	u := &r.pull
	if r.complete.Load() || r.changed != nil || r.closed.Load() || u.requests >= maxRequests {
		return false, 0
	}
	hold := u.hold
	if r.full.until.After(hold) {
		hold = r.full.until
	}
	if d := hold.Sub(now); d > 0 {
		return false, d
	}
	if !r.up && u.requests > 0 {
		return false, 0 // one request tells whether it is back
	}
	limit := requestBytes(u.pace, r.o.ChunkSize) / pageSize
	if r.demands > 0 && u.pace.yields(limit*pageSize) || !u.pace.room(limit*pageSize) {
		return false, 0
	}
	run, class := r.nextPullLocked(limit)
	if run.N == 0 {
		return false, 0
	}
	if class == memferry.ClassBackground && u.limit != nil {
		run.N = min(run.N, max(1, int64(u.limit.Burst())/pageSize))
		res := u.limit.ReserveN(now, int(run.N)*pageSize)
		if d := res.DelayFrom(now); d > 0 {
			res.CancelAt(now)
			u.seq = min(u.seq, run.Page) // it was not asked for yet
			return false, d
		}
		u.seq = min(u.seq, run.End())
	}
	r.launchLocked(r.table.Claim(run.Page, run.N, false), class)
	return true, 0
}

// nextPullLocked picks the pages to fetch next: ahead of readers, then by
// priority, then in order.
func (r *Region) nextPullLocked(limit int64) (chunk.Run, memferry.Class) {
	u := &r.pull
	if run := r.ahead.pick(r.table, limit); run.N > 0 {
		return run, memferry.ClassReadAhead
	}
	if !u.full {
		return chunk.Run{}, 0
	}
	per := r.o.ChunkSize / pageSize
	for len(u.ranked) > 0 {
		from := u.ranked[0] * per
		to := min(from+per, r.pages)
		if run := r.table.NextIdle(from, to, limit); run.N > 0 {
			return run, memferry.ClassBackground
		}
		u.ranked = u.ranked[1:]
	}
	if r.o.Priority != nil && !u.rankDone {
		return chunk.Run{}, 0 // the loop ranks the next ones first
	}
	// While the search for holes is under way, no more than a window is fetched
	// beyond where it stands: it may all be zero.
	to := min(r.pages, u.mapped+u.pace.window/pageSize)
	run := r.table.NextIdle(u.seq, to, limit)
	if run.N == 0 && u.mapped >= r.pages && u.again {
		u.again = false
		run = r.table.NextIdle(0, r.pages, limit)
	}
	if run.N > 0 {
		u.seq = run.End()
	}
	return run, memferry.ClassBackground
}

// needRank reports whether the application's priorities are needed, for chunks
// that are absent.
func (r *Region) needRank() bool {
	if r.o.Priority == nil || r.complete.Load() {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	u := &r.pull
	if u.again {
		u.again, u.rankDone = false, false
	}
	return u.full && len(u.ranked) == 0 && !u.rankDone
}

// rank finds the absent chunks that the application wants first. It looks at
// each chunk and keeps the best: one pass per batch instead of memory for all.
func (r *Region) rank() {
	per := r.o.ChunkSize / pageSize
	var best rankHeap
	skipped := false
	for page := int64(0); ; {
		page = r.table.NextAbsent(page, r.pages)
		if page == r.pages || r.ctx.Err() != nil {
			break
		}
		c := page / per
		page = (c + 1) * per
		if len(best) == priorityBatch {
			skipped = true
		}
		best.offer(rankedChunk{c, r.o.Priority(c)})
		page = min(page, r.pages)
	}
	slices.SortFunc(best, func(a, b rankedChunk) int {
		return cmp.Or(cmp.Compare(b.priority, a.priority), cmp.Compare(a.chunk, b.chunk))
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range best {
		r.pull.ranked = append(r.pull.ranked, c.chunk)
	}
	r.pull.rankDone = !skipped
}

type rankedChunk struct {
	chunk    int64
	priority int
}

// rankHeap keeps the best chunks, the worst of them on top.
type rankHeap []rankedChunk

func (h rankHeap) Len() int { return len(h) }
func (h rankHeap) Less(i, j int) bool {
	if h[i].priority != h[j].priority {
		return h[i].priority < h[j].priority
	}
	return h[i].chunk > h[j].chunk
}
func (h rankHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }

// Push and Pop are container/heap's.
func (h *rankHeap) Push(x any) { *h = append(*h, x.(rankedChunk)) }

// Pop removes the last element.
func (h *rankHeap) Pop() any {
	x := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return x
}

func (h *rankHeap) offer(c rankedChunk) {
	if len(*h) < priorityBatch {
		heap.Push(h, c)
		return
	}
	if worst := (*h)[0]; c.priority > worst.priority { // equal ones come in order
		(*h)[0] = c
		heap.Fix(h, 0)
	}
}

// Pull waits until everything is local, and makes the region fetch it if its
// PullMode does not. It fails when the remote has not answered for
// Options.IOTimeout.
func (r *Region) Pull(ctx context.Context) error {
	r.mu.Lock()
	r.pull.full = true
	r.pull.rewind(0)
	r.pull.kick()
	r.mu.Unlock()
	tick := time.NewTicker(max(r.o.IOTimeout/10, time.Millisecond))
	defer tick.Stop()
	var down time.Time
	for {
		select {
		case <-r.Done():
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-r.ctx.Done():
			return memferry.ErrClosed
		case <-tick.C:
		}
		if r.closed.Load() {
			return memferry.ErrClosed
		}
		down = r.pullTrouble(down)
		if !down.IsZero() && time.Since(down) >= r.o.IOTimeout {
			return r.pullError()
		}
		r.mu.Lock()
		err := r.changed
		r.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// pullTrouble returns since when nothing could be pulled; zero if all is well.
func (r *Region) pullTrouble(since time.Time) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pull.pause == 0 && !time.Now().Before(r.full.until) {
		return time.Time{}
	}
	if since.IsZero() {
		return time.Now()
	}
	return since
}

func (r *Region) pullError() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var last errorCount
	for _, e := range r.errs {
		if e.n > 0 && e.time.After(last.time) {
			last = e
		}
	}
	return fmt.Errorf("pull made no progress for %v: %w", r.o.IOTimeout, errors.Join(memferry.ErrTimeout, last.last))
}
