package nbd

import (
	"math/rand/v2"
	"time"
)

const (
	minBackoff = 20 * time.Millisecond
	// maxBackoff bounds the pauses between attempts to connect while nobody
	// waits, and maxWait while somebody does: it is what the end of an outage
	// may go unnoticed.
	maxBackoff = 2 * time.Second
	maxWait    = 200 * time.Millisecond
)

// retry decides when a connection that is down is dialled again. It is pure:
// time and chance are passed in.
type retry struct {
	bound time.Duration // of the pause; doubles with each failure
	pause time.Duration
	since time.Time // of the pause
}

// failed begins a pause. Half of it is chance, from 0 to 1, so that clients do
// not come in step.
func (r *retry) failed(now time.Time, chance float64) {
	r.bound = min(max(2*r.bound, minBackoff), maxBackoff)
	r.pause = r.bound/2 + time.Duration(chance*float64(r.bound/2))
	r.since = now
}

// lived takes note of how long a connection was up. One that broke at once is
// no reason to hurry.
func (r *retry) lived(d time.Duration) {
	if d > maxBackoff {
		r.bound = 0
	}
}

// due returns the end of the pause: soon if requests wait for a connection, and
// sooner if another one was made meanwhile, since the server is there.
func (r *retry) due(waiting, back bool) time.Time {
	pause := r.pause
	if waiting {
		pause = min(pause, maxWait)
	}
	if back {
		pause = min(pause, minBackoff)
	}
	return r.since.Add(pause)
}

// maintain keeps one connection up until Close.
func (c *Client) maintain(slot int, cc *clientConn) {
	var r retry
	for {
		if cc != nil {
			began := time.Now()
			err := cc.run()
			c.remove(slot, cc, err)
			r.lived(time.Since(began))
		}
		if cc = c.redial(slot, &r); cc == nil {
			return
		}
	}
}

// redial connects until it works; nil at the end.
func (c *Client) redial(slot int, r *retry) *clientConn {
	for c.ctx.Err() == nil {
		as, made := c.fences.dialing(), c.stats.made.Load()
		cc, err := dialConn(c.ctx, c.uri, c.opt, as)
		if err == nil {
			c.fences.fenced(as.fence...)
			if err = c.same(cc); err == nil && c.install(slot, cc) {
				return cc
			}
			cc.nc.Close()
			if err != nil {
				c.fail(err)
				return nil
			}
		}
		c.note(err)
		r.failed(time.Now(), rand.Float64())
		c.rest(r, made)
	}
	return nil
}

// rest waits for the end of a pause. made is how many connections had been made
// when the attempt began that failed.
func (c *Client) rest(r *retry, made int64) {
	for {
		c.mu.Lock()
		due, changed := r.due(c.waitingLocked(), c.stats.made.Load() != made), c.changed
		c.mu.Unlock()
		wait := time.Until(due)
		if wait <= 0 {
			return
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-changed:
		case <-c.ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// waitingLocked reports whether a request can't go on without a connection that
// is down: to be sent on, or to fence a broken one.
func (c *Client) waitingLocked() bool {
	return c.stats.inFlight.Load() > 0 && (c.up == 0 || c.fences.doubting())
}

// wanted ends pauses that were long because nobody waited.
func (c *Client) wanted() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waitingLocked() {
		c.broadcastLocked()
	}
}
