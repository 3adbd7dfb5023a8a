package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/memferry/memferry"
)

// Defaults of ServerOptions.
const (
	DefaultMaxRequest          = 32 << 20
	DefaultMaxInFlight         = 64
	DefaultMaxServerInFlight   = 512
	DefaultMaxMemory           = 32 << 20
	DefaultMaxConnections      = 256
	DefaultMaxOptions          = 128
	DefaultMaxOptionLength     = 16 << 10
	DefaultMaxExportNameLength = maxString
	DefaultMaxMetaContexts     = 16
	DefaultHandshakeTimeout    = 10 * time.Second
	DefaultRequestTimeout      = 30 * time.Second
	DefaultWriteTimeout        = 30 * time.Second
	DefaultStarvedTimeout      = 5 * time.Second
	DefaultFenceTimeout        = 5 * time.Second
	DefaultPollTime            = 40 * time.Microsecond
)

// ServerOptions bound what clients can make a server do. Each limit is
// enforced before memory is taken; zero means its default.
type ServerOptions struct {
	// MaxRequest is the longest read or write, in bytes.
	MaxRequest int
	// MaxInFlight is how many requests of one connection may wait for their
	// backend at once; the server stops reading the connection there.
	MaxInFlight int
	// MaxServerInFlight is the same for all connections together.
	MaxServerInFlight int
	// MaxMemory bounds the data of requests in memory, in bytes, over all
	// connections; at least MaxRequest. Reads and writes of backends that are
	// mapped memory need none.
	MaxMemory int64
	// MaxConnections bounds the clients; further ones are turned away.
	MaxConnections int
	// MaxOptions is how many options one handshake may have.
	MaxOptions int
	// MaxOptionLength bounds the data of one option, in bytes.
	MaxOptionLength int
	// MaxExportNameLength bounds the names that clients ask for, in bytes.
	MaxExportNameLength int
	// MaxMetaContexts bounds the queries for metadata contexts in one option.
	MaxMetaContexts int
	// HandshakeTimeout is how long a whole handshake may take.
	HandshakeTimeout time.Duration
	// RequestTimeout is how long a request that has begun may keep the server
	// waiting for its next bytes. There is no limit between requests.
	RequestTimeout time.Duration
	// WriteTimeout is how long a client may take to accept each MiB of
	// replies.
	WriteTimeout time.Duration
	// StarvedTimeout is how long a client may stall, in the middle of a payload
	// or in accepting a MiB of replies, while others wait for memory or for a
	// place among the requests in flight of which it holds some.
	StarvedTimeout time.Duration
	// FenceTimeout is how long a client that ends an earlier session waits for
	// the requests of that one before it is told to ask again. The handshake
	// timeout has to be longer.
	FenceTimeout time.Duration
	// PollTime is how long a connection on which nothing is in flight looks for
	// its next request before it sleeps; negative: not at all. It halves the
	// latency of clients with one request at a time, and takes up to one
	// processor while such a client is busy. Connections whose requests don't
	// come within it soon give it up, and one of a server polls at a time.
	PollTime time.Duration
	// Logger gets what clients do wrong and what backends fail at; nil: none.
	Logger *slog.Logger
}

func (o ServerOptions) withDefaults() ServerOptions {
	def(&o.MaxRequest, DefaultMaxRequest)
	def(&o.MaxInFlight, DefaultMaxInFlight)
	def(&o.MaxServerInFlight, DefaultMaxServerInFlight)
	def(&o.MaxMemory, DefaultMaxMemory)
	def(&o.MaxConnections, DefaultMaxConnections)
	def(&o.MaxOptions, DefaultMaxOptions)
	def(&o.MaxOptionLength, DefaultMaxOptionLength)
	def(&o.MaxExportNameLength, DefaultMaxExportNameLength)
	def(&o.MaxMetaContexts, DefaultMaxMetaContexts)
	def(&o.HandshakeTimeout, DefaultHandshakeTimeout)
	def(&o.RequestTimeout, DefaultRequestTimeout)
	def(&o.WriteTimeout, DefaultWriteTimeout)
	def(&o.StarvedTimeout, DefaultStarvedTimeout)
	def(&o.FenceTimeout, DefaultFenceTimeout)
	if o.PollTime == 0 {
		o.PollTime = DefaultPollTime
	}
	// One piece of memory must be able to hold the largest request, and the
	// protocol's reads with DF need 64 KiB at least.
	o.MaxRequest = min(max(o.MaxRequest, maxUnfragmented), 1<<30)
	o.MaxMemory = max(o.MaxMemory, int64(o.MaxRequest))
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

func def[T int | int64 | time.Duration](p *T, value T) {
	if *p <= 0 {
		*p = value
	}
}

// Server exports backends over NBD. All methods are safe for concurrent use.
//
// Deadlocks: a server holds views of the backends it serves while a client is
// sent their data. Close the server before the backends; their Close then does
// not wait for clients.
type Server struct {
	opt    ServerOptions
	memory *memoryPool
	pipes  pipes
	slots  chan struct{} // one per request that waits for a backend

	polling atomic.Bool // a connection is polling

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu        sync.Mutex
	exports   map[string]*export
	added     int64 // exports ever
	listeners map[net.Listener]struct{}
	conns     map[*serverConn]struct{}
	reserved  int // accepted, not yet in conns
	draining  bool
	closed    bool
	past      counters // of connections that have ended
	accepted  int64
	refused   int64
	cut       int64 // for what others waited for

	lastComplaint atomic.Int64 // UnixNano
	untold        atomic.Int64 // complaints since
}

// NewServer returns a server without exports.
func NewServer(o ServerOptions) *Server {
	o = o.withDefaults()
	s := &Server{
		opt:       o,
		memory:    newMemoryPool(o.MaxMemory),
		slots:     make(chan struct{}, o.MaxServerInFlight),
		exports:   map[string]*export{},
		listeners: map[net.Listener]struct{}{},
		conns:     map[*serverConn]struct{}{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Add makes e available to clients. It returns an error wrapping
// memferry.ErrInUse where the name is taken.
func (s *Server) Add(e Export) error {
	x, err := newExport(e, s.opt.MaxRequest)
	if err != nil {
		return fmt.Errorf("export %q: %w", e.Name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.exports[e.Name]; ok {
		return fmt.Errorf("export %q: name %w", e.Name, memferry.ErrInUse)
	}
	s.added++
	x.order = s.added
	s.exports[e.Name] = x
	return nil
}

// Remove takes an export away and disconnects its clients. It reports whether
// there was one. The backend may be closed once Remove has returned.
func (s *Server) Remove(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, ok := s.exports[name]
	delete(s.exports, name)
	for c := range s.conns {
		if ok && c.currentExport() == x {
			_ = c.nc.Close() // its goroutine ends with what this made fail
		}
	}
	return ok
}

// find returns the export that a client means. Where no export has the empty
// name, which stands for the default, that is the one that was added first.
func (s *Server) find(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, ok := s.exports[name]
	if ok || name != "" {
		return x
	}
	for _, e := range s.exports {
		if x == nil || e.order < x.order {
			x = e
		}
	}
	return x
}

// list returns the exports in the order of their names.
func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := make([]*export, 0, len(s.exports))
	for _, x := range s.exports {
		l = append(l, x)
	}
	slices.SortFunc(l, func(a, b *export) int { return strings.Compare(a.Name, b.Name) })
	return l
}

// Serve accepts clients on l until ctx is done, or Shutdown or Close is
// called, and returns when all its connections have ended: nil, or the
// listener's error. It closes l. When ctx is done connections are cut, as by
// Close; call Shutdown first for an orderly end.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !s.addListener(l) {
		_ = l.Close()
		return fmt.Errorf("serve NBD on %s: %w", l.Addr(), memferry.ErrClosed)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var wg sync.WaitGroup
	err := s.accept(ctx, l, &wg)
	s.mu.Lock()
	delete(s.listeners, l)
	ended := s.draining || s.closed
	s.mu.Unlock()
	_ = l.Close()
	if !ended {
		cancel()
	}
	wg.Wait()
	if ended || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return fmt.Errorf("serve NBD on %s: %w", l.Addr(), err)
}

// acceptPause is how long accepting rests when the process is out of file
// descriptors or the like.
const acceptPause = 50 * time.Millisecond

func (s *Server) accept(ctx context.Context, l net.Listener, wg *sync.WaitGroup) error {
	for {
		nc, err := l.Accept()
		if err != nil {
			var t interface{ Temporary() bool }
			if errors.As(err, &t) && t.Temporary() && !errors.Is(err, net.ErrClosed) {
				s.complain("accept", "err", err)
				select {
				case <-time.After(acceptPause):
					continue
				case <-ctx.Done():
				}
			}
			return err
		}
		wg.Go(func() {
			if err := s.ServeConn(ctx, nc); err != nil {
				s.opt.Logger.Debug("NBD client gone", "client", nc.RemoteAddr(), "err", err)
			}
		})
	}
}

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || s.closed {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

// ServeConn serves one client on nc until it leaves, ctx is done, or Shutdown
// or Close is called. It closes nc. It returns nil where the client took its
// leave as the protocol wants it, and where the server did.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	defer stop()
	defer nc.Close()
	c, err := s.addConn(nc)
	if err != nil {
		return err
	}
	defer s.removeConn(c)
	err = c.run()
	if err == nil || errors.Is(err, errLeft) || errors.Is(err, io.EOF) {
		return nil
	}
	return fmt.Errorf("serve NBD: %w", err)
}

var errTooManyConnections = errors.New("too many connections")

func (s *Server) addConn(nc net.Conn) (*serverConn, error) {
	s.mu.Lock()
	if s.draining || s.closed {
		s.mu.Unlock()
		return nil, memferry.ErrClosed
	}
	if len(s.conns)+s.reserved >= s.opt.MaxConnections {
		s.refused++
		s.mu.Unlock()
		s.complain("client turned away", "client", nc.RemoteAddr(), "err", errTooManyConnections, "limit", s.opt.MaxConnections)
		return nil, errTooManyConnections
	}
	s.reserved++
	s.accepted++
	s.mu.Unlock()
	tuneSocket(nc)
	c := newServerConn(s, nc)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved--
	s.conns[c] = struct{}{}
	// Shutdown and Close may have gone through conns meanwhile.
	if s.draining {
		c.drain()
	}
	if s.closed {
		_ = nc.Close()
	}
	return c, nil
}

func (s *Server) removeConn(c *serverConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(c.over)
	delete(s.conns, c)
	s.past.add(&c.counters)
}

// Shutdown stops accepting clients, lets requests in flight be answered,
// disconnects, and returns when Close would have nothing left to do. When ctx
// is done before, it closes the server and returns ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	s.closeListenersLocked()
	for c := range s.conns {
		c.drain()
	}
	s.mu.Unlock()
	tick := time.NewTicker(shutdownPoll)
	defer tick.Stop()
	for !s.idle() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("shut down NBD server: %w", ctx.Err()), s.Close())
		}
	}
	return s.Close()
}

// shutdownPoll is how often Shutdown looks whether everyone has left.
const shutdownPoll = 2 * time.Millisecond

func (s *Server) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)+s.reserved == 0
}

// Close cuts all connections and makes Serve return. It does not wait for
// backends that are at work on a request: those that take a context see it
// end, others end with their own Close.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining, s.closed = true, true
	s.cancel()
	s.closeListenersLocked()
	for c := range s.conns {
		_ = c.nc.Close()
	}
	s.memory.close()
	s.pipes.close()
	return nil
}

func (s *Server) closeListenersLocked() {
	for l := range s.listeners {
		_ = l.Close() // Accept says so if this fails
	}
}

// complaintInterval is the least time between two log lines about clients or
// backends, which could otherwise fill a disk.
const complaintInterval = 100 * time.Millisecond

// complain logs, unless it did so a moment ago.
func (s *Server) complain(msg string, args ...any) {
	now := time.Now().UnixNano()
	last := s.lastComplaint.Load()
	if now-last < int64(complaintInterval) || !s.lastComplaint.CompareAndSwap(last, now) {
		s.untold.Add(1)
		return
	}
	if n := s.untold.Swap(0); n > 0 {
		args = append(args, "unlogged", n)
	}
	s.opt.Logger.Warn(msg, args...)
}

// socketBuffer is what the server asks for as buffers of a UNIX socket, whose
// default holds less than one large request. TCP sizes its own.
const socketBuffer = 1 << 20

func tuneSocket(nc net.Conn) {
	if u, ok := nc.(*net.UnixConn); ok {
		// An error costs speed, and nothing else.
		_ = u.SetWriteBuffer(socketBuffer)
	}
}

// ServerStats is a snapshot of what a server has done.
type ServerStats struct {
	Connections int   // now
	Accepted    int64 // ever
	Refused     int64 // for the limit on connections
	Cut         int64 // stalled ones that held what others waited for
	InFlight    int   // requests that wait for a backend
	Memory      int64 // bytes that hold data of requests
	Reads       int64 // requests, ever, as are the following
	Writes      int64
	Flushes     int64
	Trims       int64
	Zeroes      int64
	Statuses    int64
	Others      int64
	ReadBytes   int64 // sent, holes included
	Spliced     int64 // bytes of those that were not copied
	WriteBytes  int64 // received
	Errors      int64 // requests that were answered with an error
	Polled      int64 // times that a request came while it was polled for
}

// Stats returns a snapshot.
func (s *Server) Stats() ServerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	var sum counters
	sum.add(&s.past)
	for c := range s.conns {
		sum.add(&c.counters)
	}
	return ServerStats{
		Connections: len(s.conns), Accepted: s.accepted, Refused: s.refused, Cut: s.cut,
		InFlight: len(s.slots), Memory: s.memory.inUse(),
		Reads: sum.commands[cmdRead].Load(), Writes: sum.commands[cmdWrite].Load(),
		Flushes: sum.commands[cmdFlush].Load(), Trims: sum.commands[cmdTrim].Load(),
		Zeroes: sum.commands[cmdWriteZeroes].Load(), Statuses: sum.commands[cmdBlockStatus].Load(),
		Others:    sum.commands[cmdDisc].Load() + sum.commands[cmdCache].Load(),
		ReadBytes: sum.readBytes.Load(), Spliced: sum.splicedBytes.Load(), WriteBytes: sum.writeBytes.Load(), Errors: sum.errors.Load(),
		Polled: sum.polled.Load(),
	}
}

// counters are those of one connection.
type counters struct {
	commands              [cmdBlockStatus + 1]atomic.Int64
	readBytes, writeBytes atomic.Int64
	splicedBytes          atomic.Int64 // of readBytes
	errors                atomic.Int64
	polled                atomic.Int64
}

func (c *counters) add(d *counters) {
	for i := range c.commands {
		c.commands[i].Add(d.commands[i].Load())
	}
	c.readBytes.Add(d.readBytes.Load())
	c.writeBytes.Add(d.writeBytes.Load())
	c.splicedBytes.Add(d.splicedBytes.Load())
	c.errors.Add(d.errors.Load())
	c.polled.Add(d.polled.Load())
}
