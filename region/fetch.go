package region

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

// request is one read of the remote, and the pages that wait for it.
type request struct {
	claim  *chunk.Fetch
	class  memferry.Class
	off, n int64
	sent   time.Time
	due    time.Time // when it should have arrived; zero if unknown
	ahead  int64     // bytes that were in flight before it
	flight flight    // of the pull pacer, unless class is demand
}

// maxFetch bounds one request to the remote. Larger ones save nothing: what
// matters is how many bytes are in flight.
const maxFetch = 1 << 20

// errLanding marks errors of the local side of a fetch.
var errLanding = errors.New("can't store what was fetched")

// launchLocked sends a request for what claim wants.
func (r *Region) launchLocked(claim *chunk.Fetch, class memferry.Class) *request {
	q := &request{claim: claim, class: class, sent: time.Now()}
	s := claim.Span()
	q.off, q.n = r.span(s.Page, s.N)
	claim.Owner = q
	if class == memferry.ClassDemand {
		r.count.demandReads++
		r.demands++
	} else {
		q.ahead = r.pull.pace.inFlight
		q.due, _ = r.pull.pace.due(q.sent, q.n)
		q.flight = r.pull.pace.send(q.sent, q.n)
		r.pull.requests++
	}
	r.spawn(func() { r.fetch(q) })
	return q
}

// fetch performs a request: what arrives is written to the local backend piece
// by piece, and whoever waits for it is woken.
func (r *Region) fetch(q *request) {
	ctx, cancel := context.WithTimeout(memferry.WithClass(r.ctx, q.class), r.o.IOTimeout)
	defer cancel()
	l := lander{r: r, q: q, ctx: ctx}
	err := r.transfer(ctx, q, &l)
	if err != nil {
		err = fmt.Errorf("fetch %d bytes at %d: %w", q.n, q.off, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	left := q.claim.Wanted()
	if err == nil && left > 0 {
		err = fmt.Errorf("fetch %d bytes at %d: the remote left out %d pages", q.n, q.off, left)
	}
	r.table.EndFetch(q.claim)
	if q.class == memferry.ClassDemand {
		r.demands--
	} else {
		r.pull.pace.end(&q.flight)
		r.pull.requests--
	}
	r.fetchEndedLocked(q, err)
	r.wakeLocked(q.claim.Page, q.claim.N, err)
	r.pull.kick()
}

func (r *Region) fetchEndedLocked(q *request, err error) {
	if err == nil {
		r.remoteUpLocked()
		return
	}
	if r.ctx.Err() != nil {
		return
	}
	r.pull.rewind(q.claim.Page)
	kind := ErrorPull
	switch {
	case errors.Is(err, errLanding):
		kind = ErrorLocal
		r.noteFullLocked(err)
	case q.class == memferry.ClassDemand:
		kind = ErrorDemand
		fallthrough
	default:
		r.remoteFailedLocked(err)
	}
	if q.class != memferry.ClassDemand {
		r.pull.failedLocked(time.Now())
	}
	r.errorLocked(kind, err)
}

// transfer reads from the remote into l.
func (r *Region) transfer(ctx context.Context, q *request, l *lander) error {
	if s := r.remote.can.StreamReader; s != nil {
		return s.ReadStream(ctx, q.off, q.n, l.piece)
	}
	b := r.buffers.get(min(maxFetch, q.n))
	defer r.buffers.put(b)
	for off, end := q.off, q.off+q.n; off < end; {
		p := b.p[:min(maxFetch, end-off)]
		if err := r.remote.read(ctx, p, off); err != nil {
			return err
		}
		if err := l.piece(off, int64(len(p)), p); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// lander takes the pieces of one request. Its methods do not overlap.
type lander struct {
	r       *Region
	q       *request
	ctx     context.Context
	runs    []chunk.Run
	partial map[int64]*partialPage
}

// partialPage is a page of which only some bytes have arrived. Pieces do not
// overlap, so that counting them is enough.
type partialPage struct {
	got int64
	p   [pageSize]byte
}

// piece takes n bytes at off; a nil p stands for zeroes.
func (l *lander) piece(off, n int64, p []byte) error {
	end := off + n
	if off < l.q.off || end > l.q.off+l.q.n || n < 0 || p != nil && int64(len(p)) != n {
		return fmt.Errorf("the remote sent %d bytes at %d, asked were %d at %d: %w", n, off, l.q.n, l.q.off, memferry.ErrOutOfRange)
	}
	defer l.arrived(n)
	page := (off + pageSize - 1) / pageSize
	last := end / pageSize
	if end == l.r.size {
		last = l.r.pages
	}
	if page >= last { // no page is whole
		return l.edges(off, end, p)
	}
	body, stop := page*pageSize, min(last*pageSize, end)
	if err := l.edges(off, body, cut(p, 0, body-off)); err != nil {
		return err
	}
	if err := l.land(page, last-page, cut(p, body-off, stop-off)); err != nil {
		return err
	}
	return l.edges(stop, end, cut(p, stop-off, n))
}

func cut(p []byte, from, to int64) []byte {
	if p == nil {
		return nil
	}
	return p[from:to]
}

// edges collects bytes of pages that come in several pieces.
func (l *lander) edges(off, end int64, p []byte) error {
	for off < end {
		page := off / pageSize
		stop := min(end, (page+1)*pageSize)
		if l.partial == nil {
			l.partial = make(map[int64]*partialPage)
		}
		b := l.partial[page]
		if b == nil {
			b = new(partialPage)
			l.partial[page] = b
		}
		if p != nil {
			copy(b.p[off%pageSize:], p[:stop-off])
			p = p[stop-off:]
		}
		b.got += stop - off
		if _, size := l.r.span(page, 1); b.got == size {
			delete(l.partial, page)
			if err := l.land(page, 1, b.p[:size]); err != nil {
				return err
			}
		}
		off = stop
	}
	return nil
}

// land stores whole pages, except those that something newer has overtaken.
func (l *lander) land(page, n int64, p []byte) error {
	r := l.r
	base, size := r.span(page, n)
	r.mu.Lock()
	l.runs = r.table.Land(l.q.claim, page, n, l.runs[:0])
	r.mu.Unlock()
	var stored int64
	var err error
	for _, run := range l.runs {
		off, k := r.span(run.Page, run.N)
		if err == nil {
			err = l.store(off, cut(p, off-base, off-base+k), k)
		}
		r.mu.Lock()
		r.table.Landed(run, err == nil)
		if err == nil {
			r.noteComplete()
			stored += k
		}
		r.wakeLocked(run.Page, run.N, err)
		r.mu.Unlock()
	}
	r.mu.Lock()
	r.count.pulled += stored
	r.count.dropped += size - stored
	r.mu.Unlock()
	return err
}

func (l *lander) store(off int64, p []byte, n int64) error {
	var err error
	if p == nil {
		err = l.r.local.zero(context.Background(), off, n, 0)
	} else {
		_, err = l.r.local.WriteAt(p, off)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errLanding, localError(err))
	}
	return nil
}

// arrived tells the pacer.
func (l *lander) arrived(n int64) {
	r := l.r
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if l.q.class != memferry.ClassDemand {
		r.pull.pace.deliver(now, &l.q.flight, n)
		r.pull.kick()
	} else if !l.q.flight.answered {
		l.q.flight.answered = true
		r.pull.pace.sample(now, now.Sub(l.q.sent))
	}
}
