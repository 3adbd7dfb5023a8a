package nbd

import (
	"errors"
	"runtime"
	"time"
)

// maxPollSkips bounds how many waits go by without polling, after polling has
// been in vain again and again.
const maxPollSkips = 1 << 10

// poller decides when a reader looks for the next request for a while before it
// sleeps: waking up takes several times as long as serving a small request
// does. It is worth a processor's time only where the next request tends to
// come within it, as from a client that has one request in flight at a time. So
// each time that none did, twice as many waits as before go by without polling.
//
// Use by one goroutine.
type poller struct {
	misses int // in a row
	skip   int // waits to come without polling
}

// due reports whether to poll before this wait.
func (p *poller) due() bool {
	if p.skip > 0 {
		p.skip--
		return false
	}
	return true
}

// polled notes whether it was in time.
func (p *poller) polled(hit bool) {
	if hit {
		p.misses, p.skip = 0, 0
		return
	}
	p.skip = min(1<<p.misses, maxPollSkips)
	if 1<<p.misses < maxPollSkips {
		p.misses++
	}
}

// pollRequest looks for the next request without sleeping, if that is worth
// it, and reports whether there is one, or an error. After a large request it
// is not: moving the bytes takes longer than waking up, and needs the processor.
func (c *serverConn) pollRequest() (bool, error) {
	s := c.srv
	if s.opt.PollTime <= 0 || c.in.raw == nil || c.bulk || len(c.slots) > 0 || !c.poller.due() {
		return false, nil
	}
	// One at a time: the clients need processors as well.
	if runtime.GOMAXPROCS(0) == 1 || !s.polling.CompareAndSwap(false, true) {
		return false, nil
	}
	defer s.polling.Store(false)
	hit, err := c.in.poll(s.opt.PollTime)
	c.poller.polled(hit)
	if hit && err == nil {
		c.counters.polled.Add(1)
	}
	return hit, err
}

// poll adds to the buffer what arrives within d, without sleeping. It reports
// whether anything did, or the connection failed.
func (s *stream) poll(d time.Duration) (bool, error) {
	p := s.space()
	for end := time.Now().Add(d); ; {
		n, err := s.receive(p, nil, false)
		if !errors.Is(err, errWouldBlock) {
			s.w += n
			return true, err
		}
		if time.Now().After(end) {
			return false, nil
		}
		runtime.Gosched()
	}
}
