package netsim

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// conn is one connection through the proxy: two sockets, and a stream in each
// direction between them.
//
//	client socket -> up.read   (queue) up.write   -> server socket
//	client socket <- down.write (queue) down.read <- server socket
//
// A stream ends by passing on the end of file, or through abort, which ends
// both. Sockets are closed when both streams have ended.
type conn struct {
	p      *Proxy
	up     *stream // client to server
	down   *stream // server to client
	dead   chan struct{}
	kicked *timer      // delays the dial, and is woken by kick
	frozen atomic.Bool // HalfOpen closed one socket, the other stays

	mu      sync.Mutex // guards what follows
	client  net.Conn   // nil once closed
	server  net.Conn   // nil until dialed and once closed
	aborted bool       // dead is closed
}

// start adopts an accepted connection.
func (p *Proxy) start(nc net.Conn) {
	c, err := p.newConn(nc)
	if err != nil {
		closeReset(nc)
		return
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		c.closeTimers()
		closeReset(nc)
		return
	}
	p.conns[c] = struct{}{}
	p.wg.Add(1)
	p.mu.Unlock()
	go func() {
		defer p.wg.Done()
		c.run(nc)
		p.mu.Lock()
		delete(p.conns, c)
		p.mu.Unlock()
	}()
}

func (p *Proxy) newConn(nc net.Conn) (*conn, error) {
	c := &conn{p: p, client: nc, dead: make(chan struct{})}
	var err error
	if c.kicked, err = newTimer(); err != nil {
		return nil, err
	}
	if c.up, err = newStream(c, &p.toServer); err != nil {
		c.closeTimers()
		return nil, err
	}
	if c.down, err = newStream(c, &p.toClient); err != nil {
		c.closeTimers()
		return nil, err
	}
	return c, nil
}

func (c *conn) closeTimers() {
	c.kicked.close()
	if c.up != nil {
		c.up.timer.close()
	}
	if c.down != nil {
		c.down.timer.close()
	}
}

// run carries the connection to its end.
func (c *conn) run(client net.Conn) {
	defer c.closeTimers()
	var wg sync.WaitGroup
	wg.Go(func() { c.up.read(client) })
	if server := c.dial(); server != nil {
		wg.Go(func() { c.up.write(server) })
		wg.Go(func() { c.down.read(server) })
		wg.Go(func() { c.down.write(client) })
	} else {
		c.broken()
	}
	wg.Wait()
	c.up.discard()
	c.down.discard()
	if c.frozen.Load() {
		<-c.dead // the socket that was left open stays so until Reset or Close
	}
	c.abort(false)
}

// dial connects to the target once the first segment of the client has had the
// time to get there. It returns nil where it can't.
func (c *conn) dial() net.Conn {
	at := time.Now().Add(c.p.link.Load().oneWay())
	for {
		wait := time.Until(at)
		switch {
		case c.ended() || c.frozen.Load():
			return nil
		case c.p.hole.Load():
			wait = time.Hour // until kicked
		case wait <= 0:
			return c.dialNow()
		}
		c.kicked.arm(wait)
		// What kick announced before the arming is looked at again.
		if c.p.hole.Load() == (wait == time.Hour) && !c.ended() && !c.frozen.Load() {
			c.kicked.sleep()
		}
	}
}

func (c *conn) dialNow() net.Conn {
	ctx, cancel := context.WithTimeout(c.p.ctx, dialTimeout)
	defer cancel()
	var d net.Dialer
	server, err := d.DialContext(ctx, c.p.target.Network, c.p.target.Address)
	if err != nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted || c.frozen.Load() {
		closeReset(server)
		return nil
	}
	c.server = server
	return server
}

func (c *conn) ended() bool {
	select {
	case <-c.dead:
		return true
	default:
		return false
	}
}

// kick makes the connection look at the state of its proxy again.
func (c *conn) kick() {
	c.kicked.wake()
	c.up.kick()
	c.down.kick()
}

// abort ends the connection now; with a reset, where one is asked for.
func (c *conn) abort(reset bool) {
	c.mu.Lock()
	client, server := c.client, c.server
	c.client, c.server = nil, nil
	if !c.aborted {
		c.aborted = true
		close(c.dead)
	}
	c.mu.Unlock()
	for _, nc := range []net.Conn{client, server} {
		switch {
		case nc == nil:
		case reset:
			closeReset(nc)
		default:
			nc.Close() //nolint:errcheck // both streams have ended
		}
	}
	c.kick()
}

// halfOpen closes one socket and freezes the other.
func (c *conn) halfOpen(closed Side) {
	c.mu.Lock()
	c.frozen.Store(true)
	var nc net.Conn
	if closed == Client {
		nc, c.client = c.client, nil
	} else {
		nc, c.server = c.server, nil
	}
	c.mu.Unlock()
	if nc != nil {
		closeReset(nc)
	}
	c.kick()
}

// broken is called when a socket failed: the other one has to be told, unless
// it was HalfOpen that did it.
func (c *conn) broken() {
	if !c.frozen.Load() {
		c.abort(true)
	}
}

// closeReset closes a TCP connection with a RST segment: SO_LINGER of zero,
// tcp(7).
func closeReset(nc net.Conn) {
	if t, ok := nc.(*net.TCPConn); ok {
		t.SetLinger(0) //nolint:errcheck // closed already
	}
	nc.Close() //nolint:errcheck // what was unsent is meant to be lost
}
