package nbd

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestRetry(t *testing.T) {
	start := time.Unix(1000, 0)
	var r retry
	for i, ms := range []int{20, 40, 80, 160, 320, 640, 1280, 2000, 2000} {
		bound := time.Duration(ms) * time.Millisecond
		for _, chance := range []float64{0, 0.5, 1} {
			r := r
			r.failed(start, chance)
			pause := r.due(false, false).Sub(start)
			if want := bound/2 + time.Duration(chance*float64(bound/2)); pause != want {
				t.Errorf("pause %d with chance %v is %v, want %v", i, chance, pause, want)
			}
			if got := r.due(true, false).Sub(start); got != min(pause, maxWait) {
				t.Errorf("pause %d while somebody waits is %v, otherwise %v", i, got, pause)
			}
			if got := r.due(false, true).Sub(start); got != min(pause, minBackoff) {
				t.Errorf("pause %d with the server back is %v, otherwise %v", i, got, pause)
			}
		}
		r.failed(start, 0)
	}
	r.lived(time.Second)
	if r.bound != maxBackoff {
		t.Errorf("a connection that lived for a second reset the pause to %v", r.bound)
	}
	r.lived(time.Minute)
	if r.failed(start, 1); r.pause != minBackoff {
		t.Errorf("after a connection that lived for a minute the pause is %v, want %v", r.pause, minBackoff)
	}
}

// outagePeer is a peer that can be away.
type outagePeer struct {
	*peer
	away     atomic.Bool
	attempts atomic.Int64
	conns    chan net.Conn
}

func newOutagePeer() *outagePeer {
	p := &outagePeer{peer: newPeer(), conns: make(chan net.Conn, 16)}
	p.export |= FlagCanMultiConn
	p.pair = func() (net.Conn, net.Conn) {
		client, server := net.Pipe()
		p.conns <- server
		return client, server
	}
	return p
}

func (p *outagePeer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	p.attempts.Add(1)
	if p.away.Load() {
		return nil, errors.New("away")
	}
	return p.peer.dial(ctx, network, address)
}

// begin takes the peer away.
func (p *outagePeer) begin() {
	p.away.Store(true)
	for len(p.conns) > 0 {
		(<-p.conns).Close()
	}
}

// TestRetryOutage: how late the end of an outage is noticed, by the clock of a
// bubble in which time passes only while everybody waits.
func TestRetryOutage(t *testing.T) {
	const connections = 4
	run := func(f func(p *outagePeer, c *Client)) {
		synctest.Test(t, func(t *testing.T) {
			p := newOutagePeer()
			c, err := Dial(t.Context(), URI{Host: "peer", Export: "x"}, ClientOptions{
				Dialer: p.dial, Connections: connections, IOTimeout: 2 * time.Hour,
			})
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Second)
			p.begin()
			f(p, c)
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			p.begin()
		})
	}
	read := func(c *Client) error { _, err := c.ReadAt(make([]byte, 512), 0); return err }
	for name, length := range map[string]time.Duration{"10s": 10 * time.Second, "an hour": time.Hour} {
		t.Run("somebody waits for "+name, func(t *testing.T) {
			run(func(p *outagePeer, c *Client) {
				done := start(func() error { return read(c) })
				time.Sleep(length)
				attempts := p.attempts.Load()
				p.away.Store(false)
				begin := time.Now()
				if err := <-done; err != nil {
					t.Error(err)
				}
				// What comes on top is the handshake: the peer looks for bytes
				// that come too early.
				if d := time.Since(begin); d > maxWait+100*time.Millisecond {
					t.Errorf("the request was answered %v after the end of the outage", d)
				}
				if limit := int64(connections * (length/(maxWait/2) + 20)); attempts > limit {
					t.Errorf("%d attempts to connect, at most %d expected", attempts, limit)
				}
				time.Sleep(100 * time.Millisecond)
				if n := c.Stats().Connections; n != connections {
					t.Errorf("%d connections are up soon after the first, want %d", n, connections)
				}
			})
		})
	}
	t.Run("somebody comes", func(t *testing.T) {
		run(func(p *outagePeer, c *Client) {
			time.Sleep(time.Hour + 100*time.Millisecond)
			before := p.attempts.Load()
			p.away.Store(false)
			begin := time.Now()
			if err := read(c); err != nil {
				t.Error(err)
			}
			if d := time.Since(begin); d > maxWait+100*time.Millisecond {
				t.Errorf("a request after the outage was answered after %v", d)
			}
			if limit := int64(connections * time.Hour / (maxBackoff / 2)); before > limit {
				t.Errorf("%d attempts to connect though nobody waited, at most %d expected", before, limit)
			}
		})
	})
}
