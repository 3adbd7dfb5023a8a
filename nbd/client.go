package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/memferry/memferry"
)

// Defaults of ClientOptions, and the client's other limits.
const (
	DefaultConnections       = 4
	DefaultIOTimeout         = 30 * time.Second
	DefaultClientHandshake   = 10 * time.Second
	DefaultClientMaxRequest  = 4 << 20
	DefaultClientMaxInFlight = 1024

	// smallDemand is the longest request that the demand connection is kept
	// for: what is longer takes its time on any connection.
	smallDemand = 256 << 10

	// stallFraction of the IOTimeout is how long a connection with requests may
	// be silent before it is replaced: late enough for slow servers, early
	// enough to try once more.
	stallFraction = 2
)

// errConnLost is why a request that had no answer is sent again.
var errConnLost = errors.New("connection lost")

// ClientOptions adjust a Client. The zero value works.
type ClientOptions struct {
	// Connections is how many connections to open where the server says that
	// several are safe (CAN_MULTI_CONN); one otherwise. The URI's parameter
	// wins.
	Connections int
	// IOTimeout is how long a request may take, outages included, before it
	// fails with memferry.ErrTimeout. The client goes on reconnecting.
	IOTimeout time.Duration
	// HandshakeTimeout bounds connecting and negotiating.
	HandshakeTimeout time.Duration
	// MaxRequest bounds one request on the wire, in bytes; longer reads and
	// writes are split. The server's own limit is kept in any case.
	MaxRequest int64
	// MaxInFlight bounds the requests under way; those of
	// memferry.ClassDemand have a bound of their own, of the same size.
	MaxInFlight int
	// ReadOnly refuses writes even where the export takes them.
	ReadOnly bool
	// Dialer replaces net.Dialer.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)
	// Logger gets lost and restored connections; nil: none.
	Logger *slog.Logger
	// OnState is called, never concurrently, when the last connection is lost
	// and when the first is back. It must not call the client.
	OnState func(up bool, err error)
}

func (o ClientOptions) withDefaults() ClientOptions {
	def(&o.Connections, DefaultConnections)
	def(&o.IOTimeout, DefaultIOTimeout)
	def(&o.HandshakeTimeout, DefaultClientHandshake)
	def(&o.MaxRequest, DefaultClientMaxRequest)
	def(&o.MaxInFlight, DefaultClientMaxInFlight)
	o.Connections = min(o.Connections, MaxConnections)
	if o.Dialer == nil {
		o.Dialer = new(net.Dialer).DialContext
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Client is an export of an NBD server as a backend. Its methods are safe for
// concurrent use.
//
// Requests travel over one or more connections. With several, one is kept for
// small requests of memferry.ClassDemand, so they never queue behind bulk. A
// connection that breaks is replaced, and its unanswered requests are sent
// again: every NBD command may be repeated. That a repeated write can land
// after another one that overlaps it changes nothing, since both were under
// way at once.
//
// A call whose context ends, or whose time is over, returns at once, and the
// connection goes on. What of its request is on its way is copied or dropped;
// until the server has answered it, it counts towards MaxInFlight.
//
// A write whose connection broke may still sit in the network or in a server
// that has not noticed. So it is sent again only once the server, asked over
// the next connection, has ended what it had under way for the broken one.
//
// BUG(nbd): only memferry's server knows such a fence. With others, a write
// whose connection broke may be carried out after its repetition and after
// newer writes. The protocol has no means against that; the client resets
// broken TCP connections to make it unlikely.
type Client struct {
	uri  URI
	opt  ClientOptions
	info ExportInfo

	maxRequest int64
	align      int64 // of offsets and lengths on the wire
	blocks     blockLocks

	fences *fences
	losses losses

	began  time.Time       // what the times of connections count from
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	slots, demandSlots chan struct{}
	calls              sync.Pool

	mu      sync.Mutex
	conns   []*clientConn // by slot; nil while down
	changed chan struct{} // closed and replaced when conns changes
	up      int
	down    atomic.Bool // up is 0; read without the mutex
	fatal   error       // sticky: the export is no longer the same
	lastErr error
	lastAt  time.Time

	stateMu sync.Mutex // held across OnState
	told    bool       // what OnState was last told

	stats clientCounters
}

type clientCounters struct {
	requests, readBytes, writeBytes, reconnects, resent atomic.Int64
	inFlight                                            atomic.Int64 // those that occupy a slot
	made                                                atomic.Int64 // connections, ever
	rtt                                                 atomic.Int64 // ns, smoothed
}

// ClientStats is a snapshot of what a client has done.
type ClientStats struct {
	Connections int   // now
	InFlight    int   // requests
	Requests    int64 // ever, as are the following
	ReadBytes   int64
	WriteBytes  int64
	Reconnects  int64
	Resent      int64
	RTT         time.Duration // of small requests, smoothed; 0: unknown
	LastError   error         // of a connection
	LastErrorAt time.Time
}

// Dial connects to an export. It returns once the first connection is usable;
// the others follow in the background. Errors name the server; a missing
// export is fs.ErrNotExist.
func Dial(ctx context.Context, uri URI, o ClientOptions) (*Client, error) {
	o = o.withDefaults()
	if uri.Connections > 0 {
		o.Connections = min(uri.Connections, MaxConnections)
	}
	f := newFences()
	first, err := dialConn(ctx, uri, o, f.dialing())
	if err != nil {
		return nil, err
	}
	c := &Client{uri: uri, opt: o, info: first.info, fences: f, changed: make(chan struct{}), began: time.Now()}
	if err := c.adopt(first); err != nil {
		first.nc.Close()
		return nil, fmt.Errorf("nbd: %s: %w", uri, err)
	}
	c.slots = make(chan struct{}, o.MaxInFlight)
	c.demandSlots = make(chan struct{}, o.MaxInFlight)
	c.calls.New = func() any { return newCall() }
	c.ctx, c.cancel = context.WithCancel(context.Background())
	n := o.Connections
	if !c.info.Flags.Has(FlagCanMultiConn) {
		n = 1
	}
	c.conns = make([]*clientConn, n)
	c.install(0, first)
	for slot := range n {
		if slot == 0 {
			c.wg.Go(func() { c.maintain(0, first) })
			continue
		}
		c.wg.Go(func() { c.maintain(slot, nil) })
	}
	c.wg.Go(c.watch)
	return c, nil
}

// adopt takes over what the first connection has negotiated.
func (c *Client) adopt(first *clientConn) error {
	b := first.info.sizes
	c.align = int64(max(b.minimum, 1))
	if c.info.Size%c.align != 0 {
		return fmt.Errorf("size %d is not a multiple of the server's block size %d, round it: %w", c.info.Size, c.align, memferry.ErrNotSupported)
	}
	limit := int64(defaultMaxPayload)
	if b.maximum != 0 {
		limit = int64(b.maximum)
	}
	c.maxRequest = max(min(limit, c.opt.MaxRequest)/c.align, 1) * c.align
	return nil
}

// Info returns what the server said of the export.
func (c *Client) Info() ExportInfo { return c.info }

// Size returns the size of the export, in bytes.
func (c *Client) Size() int64 { return c.info.Size }

// ReadOnly reports whether writes are refused.
func (c *Client) ReadOnly() bool { return c.opt.ReadOnly || c.info.Flags.Has(FlagReadOnly) }

// Capabilities returns what was negotiated.
func (c *Client) Capabilities() memferry.Capabilities {
	caps := memferry.Capabilities{
		ContextReader: c, ContextWriter: c, StreamReader: c, ReadOnly: c.ReadOnly(),
		BlockSizes: memferry.BlockSizes{Preferred: int64(c.info.sizes.preferred)},
	}
	if c.info.Flags.Has(FlagSendTrim) && !caps.ReadOnly {
		caps.Trimmer = c
	}
	if c.info.Flags.Has(FlagSendWriteZeroes) && !caps.ReadOnly {
		caps.ZeroWriter = c
	}
	if c.info.allocation {
		caps.Extenter = c
	}
	if c.info.Generation != "" {
		caps.Generationer = c
	}
	if c.info.fences {
		caps.Fencer = c
	}
	return caps
}

// Stats returns a snapshot.
func (c *Client) Stats() ClientStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return ClientStats{
		Connections: c.up, InFlight: int(c.stats.inFlight.Load()), Requests: c.stats.requests.Load(),
		ReadBytes: c.stats.readBytes.Load(), WriteBytes: c.stats.writeBytes.Load(),
		Reconnects: c.stats.reconnects.Load(), Resent: c.stats.resent.Load(),
		RTT: time.Duration(c.stats.rtt.Load()), LastError: c.lastErr, LastErrorAt: c.lastAt,
	}
}

// Close disconnects. Calls in progress return memferry.ErrClosed.
func (c *Client) Close() error {
	c.mu.Lock()
	conns := slices.Clone(c.conns)
	first := c.ctx.Err() == nil
	c.cancel()
	c.mu.Unlock()
	if first {
		var leaving sync.WaitGroup // one that is stuck does not hold up the others
		for _, cc := range conns {
			if cc != nil {
				leaving.Go(cc.leave)
			}
		}
		leaving.Wait()
	}
	c.wg.Wait()
	return nil
}

// same checks that a new connection leads to the same export.
func (c *Client) same(cc *clientConn) error {
	if cc.info.Size != c.info.Size {
		return fmt.Errorf("nbd: %s: size was %d, is now %d: %w; unmount and mount again", c.uri, c.info.Size, cc.info.Size, memferry.ErrChanged)
	}
	const matter = FlagReadOnly | FlagSendFlush | FlagSendTrim | FlagSendWriteZeroes
	if cc.info.Flags&matter != c.info.Flags&matter || cc.info.sizes != c.info.sizes {
		return fmt.Errorf("nbd: %s: export can do other things than before: %w; unmount and mount again", c.uri, memferry.ErrChanged)
	}
	cc.c = c
	return nil
}

func (c *Client) note(err error) {
	if err == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastErr, c.lastAt = err, time.Now()
}

// fail ends the client for good: every call gets err from now on.
func (c *Client) fail(err error) {
	c.note(err)
	c.mu.Lock()
	if c.fatal == nil {
		c.fatal = err
	}
	c.broadcastLocked()
	c.mu.Unlock()
	c.opt.Logger.Error("NBD export changed", "err", err)
}

func (c *Client) broadcastLocked() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// install makes cc usable, unless the client was closed meanwhile.
func (c *Client) install(slot int, cc *clientConn) bool {
	cc.c = c
	cc.heard()
	c.mu.Lock()
	if c.ctx.Err() != nil {
		c.mu.Unlock()
		return false
	}
	cc.instance = c.losses.enter(cc.info.instance)
	c.conns[slot] = cc
	c.up++
	c.down.Store(false)
	c.stats.made.Add(1)
	c.broadcastLocked()
	c.mu.Unlock()
	c.state(nil)
	return true
}

// remove takes a broken connection away.
func (c *Client) remove(slot int, cc *clientConn, err error) {
	c.losses.broke(cc.instance)
	c.mu.Lock()
	closing := c.ctx.Err() != nil
	if c.conns[slot] == cc {
		c.conns[slot] = nil
		c.up--
		c.down.Store(c.up == 0)
	}
	c.broadcastLocked()
	c.mu.Unlock()
	// Only now, so that a request is not sent again on the same connection.
	c.fences.broke(cc)
	if closing {
		return
	}
	c.note(err)
	c.stats.reconnects.Add(1)
	c.opt.Logger.Warn("NBD connection lost", "server", c.uri, "err", err)
	c.state(err)
}

// state tells OnState what is new, if anything.
func (c *Client) state(err error) {
	if c.opt.OnState == nil {
		return
	}
	c.stateMu.Lock()
	defer c.stateMu.Unlock()
	c.mu.Lock()
	up := c.up > 0
	c.mu.Unlock()
	if up == c.told {
		return
	}
	if c.told = up; up {
		err = nil
	}
	c.opt.OnState(up, err)
}

// watch replaces connections on which nothing moves though something should.
func (c *Client) watch() {
	stall := c.opt.IOTimeout / stallFraction
	tick := time.NewTicker(max(stall/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-c.ctx.Done():
			return
		}
		c.mu.Lock()
		conns := append([]*clientConn(nil), c.conns...)
		c.mu.Unlock()
		silent := func(cc *clientConn) bool { return cc != nil && cc.silent() > stall }
		if !slices.ContainsFunc(conns, silent) {
			continue
		}
		// What happened to one has probably happened to those that had nothing
		// to say meanwhile. To find out one by one takes too long.
		for _, cc := range conns {
			if silent(cc) || cc != nil && c.since(&cc.lastReply) > stall {
				cc.fail(fmt.Errorf("nothing heard for %v: %w", stall, memferry.ErrTimeout))
			}
		}
	}
}

// now is a time that no change of the wall clock moves, and since how long ago
// one was.
func (c *Client) now() int64 { return int64(time.Since(c.began)) }

func (c *Client) since(at *atomic.Int64) time.Duration { return time.Duration(c.now() - at.Load()) }

// pick returns the connection for a request, or a channel that is closed when
// there may be one.
func (c *Client) pick(k *call, class memferry.Class) (*clientConn, <-chan struct{}, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return nil, nil, memferry.ErrClosed
	}
	if c.fatal != nil {
		return nil, nil, c.fatal
	}
	demand := class == memferry.ClassDemand
	if demand && k.req.length <= smallDemand && k.fits(c.conns[0]) {
		return c.conns[0], nil, nil
	}
	var best *clientConn
	for i, cc := range c.conns {
		if !k.fits(cc) || i == 0 && !demand && c.up > 1 {
			continue
		}
		if best == nil || cc.bytes.Load() < best.bytes.Load() {
			best = cc
		}
	}
	if best == nil && k.on != nil {
		return nil, nil, errConnLost // its own is gone, and does not come back
	}
	return best, c.changed, nil
}

// fits reports whether the call may be sent on a connection.
func (k *call) fits(cc *clientConn) bool {
	return cc != nil && (k.on == nil || k.on == cc.instance)
}
