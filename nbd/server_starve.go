package nbd

import (
	"sync/atomic"
	"time"
)

// starvedChecks is how often in a StarvedTimeout whoever waits looks for
// clients that stalled.
const starvedChecks = 4

// stall tells since when a client has kept the server waiting. One goroutine
// at a time may wait; any may ask.
type stall struct{ since atomic.Int64 } // UnixNano; 0: it doesn't

func (s *stall) begin(now time.Time) { s.since.Store(now.UnixNano()) }
func (s *stall) end()                { s.since.Store(0) }

// over reports whether the wait began d or longer before now.
func (s *stall) over(now time.Time, d time.Duration) bool {
	since := s.since.Load()
	return since != 0 && now.UnixNano()-since >= int64(d)
}

// stalled reports whether the client has kept the server waiting for longer
// than it may while it holds what others need.
func (c *serverConn) stalled(now time.Time) bool {
	limit := c.srv.opt.StarvedTimeout
	if !c.in.stall.over(now, limit) && !c.out.stall.over(now, limit) {
		return false
	}
	return c.bufs.Load() > 0 || len(c.slots) > 0
}

// starved is called now and then while c waits for memory, or for a place
// among the requests in flight. It cuts the clients that hold such and have
// stalled: without that, a few that never read what they asked for could keep
// all others waiting until their timeouts, which are made for slow networks.
func (c *serverConn) starved() {
	s, now := c.srv, time.Now()
	if c.stalled(now) {
		return // it waits for itself
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for other := range s.conns {
		if other == c || !other.stalled(now) {
			continue
		}
		s.cut++
		s.complain("client cut: it stalled with what others wait for", "client", other.nc.RemoteAddr(),
			"timeout", s.opt.StarvedTimeout)
		_ = other.nc.Close() // its goroutine ends with what this made fail
	}
}
