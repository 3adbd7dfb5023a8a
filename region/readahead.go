package region

import (
	"sync/atomic"

	"github.com/memferry/memferry/internal/chunk"
)

const (
	// maxStreams bounds how many readers are told apart.
	maxStreams = 8

	// streamSlack is how far from where it was expected a read may begin, in
	// its own lengths, and still be sequential: kernels read ahead in parallel.
	streamSlack = 2

	minAheadLimit = 4 << 20 // bytes that a sequential reader is led by, at most,
	maxAheadLimit = maxWindow
)

// stream is one reader that goes forward.
type stream struct {
	next   int64 // page after the last one read
	window int64 // pages to have ahead of it
	hits   int   // reads that fitted
	used   int64 // clock of the last one
}

// readAhead follows the readers. The region's mutex guards it, but for marks.
type readAhead struct {
	streams [maxStreams]stream
	clock   int64

	// marks lets a read of resident data tell, without a lock, whether it has
	// come so far into a stream's window that more must be fetched.
	marks [maxStreams]mark
}

// mark is a range of pages; lo > hi while there is nothing to watch for.
type mark struct{ lo, hi atomic.Int64 }

// follow takes note of a read. It costs a few loads where the data was
// resident and no stream needs more.
func (r *Region) follow(page, n int64, resident bool) {
	if r.o.Pull == PullNone || resident && !r.ahead.crossed(page+n) {
		return
	}
	r.mu.Lock()
	r.ahead.touch(page, n, r.o.ChunkSize/pageSize, r.aheadLimitLocked())
	r.pull.kick()
	r.mu.Unlock()
}

func (a *readAhead) crossed(end int64) bool {
	for i := range a.marks {
		m := &a.marks[i]
		if lo := m.lo.Load(); end > lo && end <= m.hi.Load() && lo > 0 {
			return true
		}
	}
	return false
}

// aheadLimitLocked returns how many pages a sequential reader is led by: what
// the link carries in two round trips.
func (r *Region) aheadLimitLocked() int64 {
	return min(max(int64(2*r.pull.pace.bdp()), r.pull.pace.window, minAheadLimit), maxAheadLimit) / pageSize
}

// touch finds the stream that a read belongs to, or makes one of it.
func (a *readAhead) touch(page, n, first, limit int64) {
	a.clock++
	i := a.find(page, n)
	s := &a.streams[i]
	if s.used != 0 && s.fits(page, n) {
		s.hits++
		s.window = min(max(2*s.window, first), limit)
		s.next = max(s.next, page+n)
	} else {
		// The first read of a stream brings the rest of its chunk.
		*s = stream{next: page + n, window: (page+n+first-1)/first*first - (page + n)}
	}
	s.used = a.clock
	m := &a.marks[i]
	m.lo.Store(s.next + s.window/2)
	m.hi.Store(s.next + s.window + first)
}

// proven reports whether the reader has gone forward more than once.
func (s *stream) proven() bool { return s.hits >= 2 }

func (s *stream) fits(page, n int64) bool {
	slack := streamSlack*n + 1
	return page >= s.next-slack-n && page <= s.next+slack
}

// find returns the stream that fits best, else the one to give up.
func (a *readAhead) find(page, n int64) int {
	best, oldest := -1, 0
	for i := range a.streams {
		s := &a.streams[i]
		// Random reads must not displace a reader that goes forward.
		if o := &a.streams[oldest]; s.proven() == o.proven() && s.used < o.used || o.proven() && !s.proven() {
			oldest = i
		}
		if s.used == 0 || !s.fits(page, n) {
			continue
		}
		if best < 0 || abs(page-s.next) < abs(page-a.streams[best].next) {
			best = i
		}
	}
	if best >= 0 {
		return best
	}
	return oldest
}

func abs(n int64) int64 { return max(n, -n) }

// sequential reports whether a page lies ahead of a reader that goes forward.
func (a *readAhead) sequential(page int64) bool {
	for i := range a.streams {
		s := &a.streams[i]
		if s.proven() && page >= s.next-s.window && page <= s.next+s.window {
			return true
		}
	}
	return false
}

// pick returns the next pages to fetch ahead of a reader, the latest reader
// first; its length is 0 if all have what they need.
func (a *readAhead) pick(t *chunk.Table, limit int64) chunk.Run {
	var tried [maxStreams]bool
	for range maxStreams {
		at := -1
		for i := range a.streams {
			if !tried[i] && a.streams[i].used != 0 && (at < 0 || a.streams[i].used > a.streams[at].used) {
				at = i
			}
		}
		if at < 0 {
			break
		}
		tried[at] = true
		s := &a.streams[at]
		to := min(s.next+s.window, t.Pages())
		if s.next >= to {
			continue
		}
		if run := t.NextIdle(s.next, to, limit); run.N > 0 {
			return run
		}
	}
	return chunk.Run{}
}
