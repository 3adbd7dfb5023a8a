package nbd

import (
	"sync/atomic"
	"time"
)

// starvedChecks is how often in a StarvedTimeout whoever waits looks for
// clients that stalled.
const starvedChecks = 4

// patience bounds the waits for a client, in one direction, and tells since
// when it has kept the server waiting. One goroutine at a time may wait; any
// may ask with over.
type patience struct {
	timeout  time.Duration // of a wait; 0: for ever
	deadline time.Time     // as it was set; zero: none
	set      func(time.Time) error
	since    atomic.Int64 // UnixNano; 0: it doesn't wait, or not for what it has begun
}

// arm makes sure that a wait that starts now ends within the timeout, and not
// before three quarters of it: setting the deadline anew each time costs too
// much. It returns the time.
func (p *patience) arm() time.Time {
	now := time.Now()
	if p.timeout > 0 && p.deadline.Sub(now) < p.timeout*3/4 {
		p.setDeadline(now.Add(p.timeout))
	}
	return now
}

func (p *patience) setDeadline(t time.Time) {
	p.deadline = t
	// An error means that the connection is closed; the wait will say so.
	_ = p.set(t)
}

// begin is arm for a wait while the client may hold what others need.
func (p *patience) begin() { p.since.Store(p.arm().UnixNano()) }
func (p *patience) end()   { p.since.Store(0) }

// over reports whether such a wait began d or longer before now.
func (p *patience) over(now time.Time, d time.Duration) bool {
	since := p.since.Load()
	return since != 0 && now.UnixNano()-since >= int64(d)
}

// stalled reports whether the client has kept the server waiting for longer
// than it may while it holds what others need.
func (c *serverConn) stalled(now time.Time) bool {
	limit := c.srv.opt.StarvedTimeout
	if !c.in.patience.over(now, limit) && !c.out.patience.over(now, limit) {
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
