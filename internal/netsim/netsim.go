// Package netsim is a network link with a delay, a bandwidth and faults, for
// tests, benchmarks and the demonstration: a proxy that carries TCP or UNIX
// stream connections to one target.
//
// # What is simulated
//
// Each piece of bytes is stamped when it arrives and passed on half a round
// trip later. Pieces travel independently of one another, so a delay costs no
// throughput as long as the endpoints keep enough bytes in flight. The target
// is dialed half a round trip after a client was accepted. The ends of streams
// and resets travel with the bytes, in order.
//
// The one thing that can't be simulated from outside the kernel is the first
// round trip of connect(2): it is answered at once.
//
// # Precision
//
// The Go runtime's timers wake an idle process with a resolution of a
// millisecond, as epoll_wait(2) does. Waiting here is done on timerfd_create(2)
// descriptors instead, which wake the poller to within some tens of
// microseconds. What each stream has lately seen that to take at the least is
// taken off its sleeps, and spun away where one ends sooner: bytes are never
// early. On a busy machine they are late by as long as a process waits for its
// turn.
package netsim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Limits and defaults.
const (
	// DefaultBuffer bounds the bytes that are under way in one direction of
	// the link: 100 ms of 5 GB/s.
	DefaultBuffer = 512 << 20
	// DefaultQueue is how far ahead of its bandwidth a link accepts bytes:
	// the buffer of a home router that is not badly made.
	DefaultQueue = 10 * time.Millisecond
	// connShare is the part of Buffer that one connection may fill, so that
	// one whose receiver sleeps does not stop the others.
	connShare = 4
	// blockSize is the unit of buffer memory. A read takes what is left of a
	// block, but at least minRead.
	blockSize = 512 << 10
	minRead   = 64 << 10
	// dialTimeout bounds the connection to the target, which is local.
	dialTimeout = 10 * time.Second
)

// Link describes the simulated network. The zero value is a wire without
// delay.
type Link struct {
	// RTT is the round-trip time: half of it is spent in each direction.
	RTT time.Duration
	// Jitter adds up to this much to each direction, at random, without ever
	// changing the order of bytes.
	Jitter time.Duration
	// Bandwidth bounds each direction, all connections together, in bytes per
	// second. 0 means no bound.
	Bandwidth int64
	// Queue is how long bytes may wait for their turn under Bandwidth before
	// the sender is made to wait. 0 means DefaultQueue.
	Queue time.Duration
	// Buffer bounds the bytes under way in each direction; one connection may
	// use a quarter of it. A sender beyond it is made to wait. 0 means
	// DefaultBuffer.
	Buffer int64
}

func (l Link) withDefaults() (Link, error) {
	if l.RTT < 0 || l.Jitter < 0 || l.Queue < 0 {
		return l, fmt.Errorf("link: negative duration in %+v", l)
	}
	if l.Bandwidth < 0 || l.Buffer < 0 {
		return l, fmt.Errorf("link: negative size in %+v", l)
	}
	if l.Queue == 0 {
		l.Queue = DefaultQueue
	}
	if l.Buffer == 0 {
		l.Buffer = DefaultBuffer
	}
	l.Buffer = max(l.Buffer, connShare*blockSize)
	return l, nil
}

// Addr is where to listen or what to dial, as in [net.Dial].
type Addr struct {
	Network, Address string // "tcp" or "unix"
}

// TCP and UNIX return addresses of those networks.
func TCP(hostport string) Addr { return Addr{"tcp", hostport} }

// UNIX returns the address of a UNIX stream socket.
func UNIX(path string) Addr { return Addr{"unix", path} }

// Side is one end of the connections through a proxy.
type Side uint8

// The two ends.
const (
	Client Side = iota
	Server
)

// Proxy carries connections over a simulated link. All methods are safe for
// concurrent use.
type Proxy struct {
	target    Addr
	bound     Addr // where it listens, with the port that was chosen
	addr      net.Addr
	ctx       context.Context
	cancel    context.CancelFunc
	wg        sync.WaitGroup // acceptors, and the goroutines of connections
	blocks    blockPool
	toServer  direction
	toClient  direction
	stopAfter func() bool

	// control serialises Refuse and Close, which wait for the acceptor.
	control sync.Mutex

	link atomic.Pointer[Link] // never changed, only replaced
	hole atomic.Bool          // nothing passes

	mu       sync.Mutex // guards what follows
	closed   bool
	listener net.Listener // nil while refusing
	accepted chan struct{}
	conns    map[*conn]struct{}
}

// Listen starts a proxy to target and returns it. It works until Close, or
// until ctx ends.
func Listen(ctx context.Context, listen, target Addr, link Link) (*Proxy, error) {
	link, err := link.withDefaults()
	if err != nil {
		return nil, err
	}
	p := &Proxy{target: target, bound: listen, conns: make(map[*conn]struct{})}
	p.link.Store(&link)
	p.toServer.init(p)
	p.toClient.init(p)
	l, err := p.listen()
	if err != nil {
		return nil, err
	}
	p.addr = l.Addr()
	p.bound.Address = p.addr.String()
	p.ctx, p.cancel = context.WithCancel(ctx)
	p.startAcceptor(l)
	p.stopAfter = context.AfterFunc(ctx, func() { p.Close() }) //nolint:errcheck // reported to whoever closes
	return p, nil
}

func (p *Proxy) listen() (net.Listener, error) {
	l, err := net.Listen(p.bound.Network, p.bound.Address)
	if err != nil {
		return nil, fmt.Errorf("netsim: %w", err)
	}
	if u, ok := l.(*net.UnixListener); ok {
		// Refuse leaves the file, so that clients are refused rather than
		// told that there is no such socket.
		u.SetUnlinkOnClose(false)
	}
	return l, nil
}

// Addr is where the proxy listens.
func (p *Proxy) Addr() net.Addr { return p.addr }

// SetLink changes the link. Bytes already under way keep their schedule.
func (p *Proxy) SetLink(link Link) error {
	link, err := link.withDefaults()
	if err != nil {
		return err
	}
	p.link.Store(&link)
	p.toServer.changed()
	p.toClient.changed()
	p.kick()
	return nil
}

// Link returns the link as it is now.
func (p *Proxy) Link() Link { return *p.link.Load() }

// Conns returns the number of connections that are open on either side.
func (p *Proxy) Conns() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns)
}

// Bytes returns how many bytes have been delivered in each direction.
func (p *Proxy) Bytes() (toServer, toClient int64) {
	return p.toServer.delivered.Load(), p.toClient.delivered.Load()
}

// Blackhole makes bytes, ends of streams and new connections go nowhere while
// it is on. Nothing is closed, and as with the retransmissions of TCP, what was
// sent meanwhile arrives after it is turned off.
func (p *Proxy) Blackhole(on bool) {
	p.hole.Store(on)
	p.kick()
}

// kick makes all connections look at the proxy's state again.
func (p *Proxy) kick() {
	for _, c := range p.snapshot() {
		c.kick()
	}
}

// Reset breaks every connection at once, on both sides, as a router that lost
// its state does: with RST segments, so that both ends get ECONNRESET. (On UNIX
// sockets it is an end of file, or ECONNRESET where bytes were unread.) Bytes
// under way are lost.
func (p *Proxy) Reset() {
	for _, c := range p.snapshot() {
		c.abort(true)
	}
}

// HalfOpen closes every connection at the given side with a reset, and tells
// the other side nothing: it stays open, accepts some bytes and never answers,
// as after the crash of the host behind it. Connections made later are whole.
func (p *Proxy) HalfOpen(closed Side) {
	for _, c := range p.snapshot() {
		c.halfOpen(closed)
	}
}

// Refuse makes new connections fail with ECONNREFUSED while it is on. Those
// that exist are not touched.
func (p *Proxy) Refuse(on bool) error {
	p.control.Lock()
	defer p.control.Unlock()
	p.mu.Lock()
	l, accepted, closed := p.listener, p.accepted, p.closed
	p.mu.Unlock()
	switch {
	case closed:
		return net.ErrClosed
	case on && l != nil:
		return p.stopAcceptor(l, accepted)
	case !on && l == nil:
		if err := p.unlink(); err != nil {
			return err
		}
		l, err := p.listen()
		if err != nil {
			return err
		}
		p.startAcceptor(l)
	}
	return nil
}

// unlink removes the file of a UNIX socket.
func (p *Proxy) unlink() error {
	if p.bound.Network != "unix" {
		return nil
	}
	if err := os.Remove(p.bound.Address); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (p *Proxy) startAcceptor(l net.Listener) {
	accepted := make(chan struct{})
	p.mu.Lock()
	p.listener, p.accepted = l, accepted
	p.mu.Unlock()
	p.wg.Go(func() {
		defer close(accepted)
		for {
			nc, err := l.Accept()
			if err != nil {
				if p.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
					return
				}
				time.Sleep(time.Millisecond) // out of descriptors, say
				continue
			}
			p.start(nc)
		}
	})
}

func (p *Proxy) stopAcceptor(l net.Listener, accepted <-chan struct{}) error {
	p.mu.Lock()
	p.listener = nil
	p.mu.Unlock()
	err := l.Close()
	<-accepted
	return err
}

// Close breaks everything and returns when nothing is left of the proxy.
func (p *Proxy) Close() error {
	p.control.Lock()
	defer p.control.Unlock()
	p.mu.Lock()
	already := p.closed
	p.closed = true
	l, accepted := p.listener, p.accepted
	p.mu.Unlock()
	if already {
		p.wg.Wait()
		return nil
	}
	if p.stopAfter != nil {
		p.stopAfter()
	}
	p.cancel()
	var err error
	if l != nil {
		err = p.stopAcceptor(l, accepted)
	}
	p.Reset()
	p.wg.Wait()
	p.blocks.drop()
	return errors.Join(err, p.unlink())
}

func (p *Proxy) snapshot() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	conns := make([]*conn, 0, len(p.conns))
	for c := range p.conns {
		conns = append(conns, c)
	}
	return conns
}

// oneWay draws the delay of one piece of bytes.
func (l *Link) oneWay() time.Duration {
	d := l.RTT / 2
	if l.Jitter > 0 {
		d += rand.N(l.Jitter)
	}
	return d
}
