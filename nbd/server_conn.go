package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/memferry/memferry"
)

// serverConn is one client.
//
// One goroutine reads its requests and serves those that can't block: from
// mapped memory, or from the page cache. It hands each other request to a
// goroutine of its own, so a request that waits for a disk or a remote holds
// up no other, and replies leave in the order in which they are ready.
type serverConn struct {
	srv *Server
	nc  net.Conn
	in  *stream
	out *replies

	ctx    context.Context // ends when the client is gone: reads are in vain
	cancel context.CancelFunc

	// Set by the handshake, then constant.
	exp        *export
	structured bool
	flags      TransmissionFlags
	contexts   []metaContext
	session    string // the id that the client gave the connection

	current atomic.Pointer[export] // exp, for Server.Remove

	slots chan struct{}  // one per request in flight, until its reply is sent
	bufs  atomic.Int64   // buffers of the server's memory that requests hold
	tasks sync.WaitGroup // goroutines at work on requests

	// Of the reading goroutine.
	reads  uint // of this connection, to try for holes now and then
	holes  bool // the last try found one
	bulk   bool // the last request was for many bytes
	poller poller

	mu       sync.Mutex
	idle     bool // the reader waits for the first byte of a request
	draining bool

	fenced atomic.Bool   // no further request may be served
	over   chan struct{} // closed when none is being served

	counters counters
}

func newServerConn(s *Server, nc net.Conn) *serverConn {
	c := &serverConn{srv: s, nc: nc, in: newStream(nc, 0), slots: make(chan struct{}, s.opt.MaxInFlight), over: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	c.out = newReplies(nc, s.opt.WriteTimeout, c.released)
	return c
}

func (c *serverConn) currentExport() *export { return c.current.Load() }

func (c *serverConn) setExport(x *export) {
	c.exp = x
	c.current.Store(x)
}

// run is the life of the connection.
func (c *serverConn) run() error {
	defer c.cancel()
	if err := c.negotiate(); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	if c.srv.find(c.exp.Name) != c.exp {
		return fmt.Errorf("export %q was removed", c.exp.Name)
	}
	c.in.patience.timeout = c.srv.opt.RequestTimeout
	c.in.patience.deadline = time.Time{}
	err := c.transmit()
	switch {
	case errors.Is(err, errLeft), errors.Is(err, errDrained):
	default:
		// Nobody waits for what is being read. Writes go on: they are as good
		// as answered.
		c.cancel()
		if !errors.Is(err, errAnswered) {
			c.out.fail(err)
		}
	}
	c.tasks.Wait()
	c.out.drain()
	if errors.Is(err, errDrained) {
		return nil
	}
	return err
}

var (
	// errDrained ends a connection for Shutdown.
	errDrained = errors.New("server is shutting down")
	// errAnswered ends a connection after the replies so far are sent.
	errAnswered = errors.New("disconnected after an error")
)

// drain makes the connection end once the requests that have arrived are
// answered.
func (c *serverConn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	if c.idle || c.current.Load() == nil {
		// Ends the reader's wait; in the handshake, all of it.
		_ = c.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

func (c *serverConn) isDraining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining
}

// transmit serves requests until the connection ends.
func (c *serverConn) transmit() error {
	for {
		rq, err := c.next()
		if err != nil {
			return err
		}
		if c.fenced.Load() {
			return errFenced
		}
		if int(rq.typ) < len(c.counters.commands) {
			c.counters.commands[rq.typ].Add(1)
		}
		if rq.typ == cmdDisc {
			return errLeft
		}
		c.bulk = rq.length >= bulkPayload
		if refusal := c.validate(rq); refusal != nil {
			err = c.refuse(rq, refusal)
		} else {
			err = c.dispatch(rq)
		}
		if err != nil {
			return err
		}
		if err := c.out.makeRoom(); err != nil {
			return err
		}
	}
}

// next decodes the next request. Before it waits for one, replies are sent.
func (c *serverConn) next() (request, error) {
	for c.in.buffered() < requestLen {
		c.out.flush()
		var err error
		if c.in.buffered() == 0 {
			err = c.awaitRequest()
		} else {
			err = c.in.need(requestLen)
		}
		if err != nil {
			return request{}, err
		}
	}
	return parseRequest(c.in.take(requestLen))
}

// awaitRequest waits, for any time, for the first bytes of a request.
func (c *serverConn) awaitRequest() error {
	c.mu.Lock()
	if c.draining {
		c.mu.Unlock()
		return errDrained
	}
	c.idle = true
	c.mu.Unlock()
	here, err := c.pollRequest()
	if !here {
		err = c.in.fill()
	}
	c.mu.Lock()
	c.idle = false
	draining := c.draining
	c.mu.Unlock()
	if err != nil && isTimeout(err) {
		if draining {
			return errDrained
		}
		// Left over from an earlier request: there is no limit here.
		c.in.patience.setDeadline(time.Time{})
		return nil
	}
	return err
}

// refusal is why a request is not served.
type refusal struct {
	errno   Errno
	message string
}

func refuse(errno Errno, format string, args ...any) *refusal {
	return &refusal{errno, fmt.Sprintf(format, args...)}
}

// allowedFlags are the flags of each command. FUA is valid with all of them.
var allowedFlags = [...]uint16{
	cmdRead:        cmdFlagFUA | cmdFlagDF,
	cmdWrite:       cmdFlagFUA,
	cmdDisc:        cmdFlagFUA,
	cmdFlush:       cmdFlagFUA,
	cmdTrim:        cmdFlagFUA,
	cmdCache:       cmdFlagFUA,
	cmdWriteZeroes: cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero,
	cmdBlockStatus: cmdFlagFUA | cmdFlagReqOne,
}

// validate decides whether rq may be dispatched ("Error values").
func (c *serverConn) validate(rq request) *refusal {
	if int(rq.typ) >= len(allowedFlags) {
		return refuse(EINVAL, "unknown command %d", rq.typ)
	}
	if r := c.validateFlags(rq); r != nil {
		return r
	}
	if r := c.validateCommand(rq); r != nil {
		return r
	}
	return c.validateRange(rq)
}

func (c *serverConn) validateFlags(rq request) *refusal {
	allowed := allowedFlags[rq.typ]
	if !c.flags.Has(FlagSendFUA) {
		allowed &^= cmdFlagFUA
	}
	if !c.flags.Has(FlagSendDF) {
		allowed &^= cmdFlagDF
	}
	if !c.flags.Has(FlagSendFastZero) {
		allowed &^= cmdFlagFastZero
	}
	if bad := rq.flags &^ allowed; bad != 0 {
		return refuse(EINVAL, "flags %#x are not valid for %s here", bad, commandName(rq.typ))
	}
	return nil
}

// validateCommand checks that the command was advertised.
func (c *serverConn) validateCommand(rq request) *refusal {
	var need TransmissionFlags
	switch rq.typ {
	case cmdWrite, cmdTrim, cmdWriteZeroes:
		if c.flags.Has(FlagReadOnly) {
			return refuse(EPERM, "export is read-only")
		}
	}
	switch rq.typ {
	case cmdFlush:
		need = FlagSendFlush
	case cmdTrim:
		need = FlagSendTrim
	case cmdWriteZeroes:
		need = FlagSendWriteZeroes
	case cmdCache:
		need = FlagSendCache
	case cmdBlockStatus:
		if len(c.contexts) == 0 {
			return refuse(EINVAL, "no metadata context was selected")
		}
	}
	if !c.flags.Has(need) {
		return refuse(EINVAL, "%s was not advertised", commandName(rq.typ))
	}
	return nil
}

func (c *serverConn) validateRange(rq request) *refusal {
	if rq.typ == cmdFlush {
		if rq.offset != 0 || rq.length != 0 {
			return refuse(EINVAL, "FLUSH with an offset or a length")
		}
		return nil
	}
	size := uint64(c.exp.size)
	if rq.offset > size || uint64(rq.length) > size-rq.offset {
		errno := EINVAL
		if rq.typ == cmdWrite || rq.typ == cmdWriteZeroes {
			errno = ENOSPC
		}
		return refuse(errno, "%s of %d bytes at %d is past the end, %d", commandName(rq.typ), rq.length, rq.offset, size)
	}
	if block := uint64(c.exp.sizes.minimum); rq.offset%block != 0 || uint64(rq.length)%block != 0 {
		return refuse(EINVAL, "%s of %d bytes at %d is not aligned to %d", commandName(rq.typ), rq.length, rq.offset, block)
	}
	switch rq.typ {
	case cmdRead, cmdWrite:
		if rq.length > c.exp.sizes.maximum {
			errno := EINVAL
			if rq.typ == cmdRead && c.structured {
				errno = EOVERFLOW
			}
			return refuse(errno, "%s of %d bytes, limit %d", commandName(rq.typ), rq.length, c.exp.sizes.maximum)
		}
	case cmdBlockStatus:
		if rq.length == 0 {
			return refuse(EINVAL, "BLOCK_STATUS of 0 bytes")
		}
	}
	return nil
}

// refuse answers rq with an error and keeps the stream in step, unless that
// would take reading more than any peer should send ("Size constraints").
func (c *serverConn) refuse(rq request, r *refusal) error {
	c.replyError(rq, r.errno, r.message, held{})
	if rq.typ != cmdWrite {
		return nil
	}
	if int64(rq.length) > int64(max(c.srv.opt.MaxRequest, defaultMaxPayload)) {
		return fmt.Errorf("%w: %s", errAnswered, r.message)
	}
	return c.discard(int64(rq.length))
}

// discard drops a payload.
func (c *serverConn) discard(n int64) error {
	c.out.flush()
	return c.in.discard(n)
}

// errnoOf maps an error of a backend for a command to the protocol's.
func errnoOf(rq request, err error) Errno {
	var e Errno
	switch {
	case errors.As(err, &e):
		if e == ENOTSUP && rq.flags&cmdFlagFastZero == 0 {
			return EINVAL
		}
		return e
	case errors.Is(err, memferry.ErrReadOnly):
		return EPERM
	case isNoSpace(err):
		return ENOSPC
	case errors.Is(err, memferry.ErrOutOfRange):
		if rq.typ == cmdWrite || rq.typ == cmdWriteZeroes {
			return ENOSPC
		}
		return EINVAL
	case errors.Is(err, memferry.ErrNotSupported):
		if rq.typ == cmdWriteZeroes && rq.flags&cmdFlagFastZero != 0 {
			return ENOTSUP
		}
		return EINVAL
	}
	return errnoOfSystem(err)
}

// replyError adds the reply to a request that failed.
func (c *serverConn) replyError(rq request, errno Errno, message string, h held) {
	c.counters.errors.Add(1)
	b := c.out.begin()
	if c.structured {
		b.arena = appendErrorChunk(b.arena, rq.cookie, errno, message)
	} else {
		b.arena = appendSimpleReply(b.arena, simpleReply{errno, rq.cookie})
	}
	c.out.commit(h, h.slot)
}

// replyFailure is replyError for an error of the backend. Its text stays here:
// it may name things of this host that are none of the client's business.
func (c *serverConn) replyFailure(rq request, err error, h held) {
	if errors.Is(err, context.Canceled) && c.ctx.Err() != nil {
		c.replyError(rq, ESHUTDOWN, "", h)
		return
	}
	errno := errnoOf(rq, err)
	if errno != ENOTSUP {
		c.srv.complain("NBD request failed", "export", c.exp.Name, "command", commandName(rq.typ),
			"offset", rq.offset, "length", rq.length, "err", err)
	}
	c.replyError(rq, errno, fmt.Sprintf("%s of %d bytes at %d: %s", commandName(rq.typ), rq.length, rq.offset, errno), h)
}

// replyDone adds the reply to a request that succeeded and has no data.
func (c *serverConn) replyDone(rq request, h held) {
	b := c.out.begin()
	if c.structured && rq.typ == cmdRead {
		b.arena = appendChunkHeader(b.arena, chunkHeader{replyFlagDone, chunkNone, rq.cookie, 0})
	} else {
		b.arena = appendSimpleReply(b.arena, simpleReply{0, rq.cookie})
	}
	c.out.commit(h, h.slot)
}

// replyData adds the reply to a read.
func (c *serverConn) replyData(rq request, p []byte, h held) {
	c.counters.readBytes.Add(int64(len(p)))
	b := c.out.begin()
	b.arena = c.appendDataHeader(b.arena, rq)
	b.addData(p)
	c.out.commit(h, h.slot)
}

// appendDataHeader appends what precedes the data of a read.
func (c *serverConn) appendDataHeader(b []byte, rq request) []byte {
	if c.structured {
		return appendOffsetData(b, replyFlagDone, rq.cookie, rq.offset, rq.length)
	}
	return appendSimpleReply(b, simpleReply{0, rq.cookie})
}

// replyHole adds the reply to a read of zeroes; structured replies only.
func (c *serverConn) replyHole(rq request, h held) {
	c.counters.readBytes.Add(int64(rq.length))
	b := c.out.begin()
	b.arena = appendOffsetHole(b.arena, replyFlagDone, rq.cookie, rq.offset, rq.length)
	c.out.commit(h, h.slot)
}

// released takes back what a reply held.
func (c *serverConn) released(h held) {
	if h.buf != nil {
		c.giveBack(h.buf)
	}
	if h.viewer != nil {
		h.viewer.ReleaseView()
	}
	if h.slot {
		<-c.slots
		<-c.srv.slots
	}
}

// acquireSlot waits until one more request may be in flight. What is in
// flight may have been answered, so those replies are sent first.
func (c *serverConn) acquireSlot() error {
	for _, slots := range []chan struct{}{c.slots, c.srv.slots} {
		select {
		case slots <- struct{}{}:
			continue
		default:
		}
		c.out.flush()
		if err := c.waitForSlot(slots); err != nil {
			if slots == c.srv.slots {
				<-c.slots
			}
			return err
		}
	}
	return nil
}

func (c *serverConn) waitForSlot(slots chan struct{}) error {
	tick := time.NewTicker(c.srv.opt.StarvedTimeout / starvedChecks)
	defer tick.Stop()
	for {
		select {
		case slots <- struct{}{}:
			return nil
		case <-c.ctx.Done():
			return c.ctx.Err()
		case <-tick.C:
			c.starved()
		}
	}
}

// buffer returns memory for n bytes, for which it may have to wait.
func (c *serverConn) buffer(n int) (*buffer, error) {
	b, err := c.srv.memory.tryGet(n)
	if b == nil && err == nil {
		c.out.flush()
		b, err = c.waitForBuffer(n)
	}
	if b != nil {
		c.bufs.Add(1)
	}
	return b, err
}

// waitForBuffer is buffer for when there is none now. What it returns is not
// yet counted.
func (c *serverConn) waitForBuffer(n int) (*buffer, error) {
	tick := time.NewTicker(c.srv.opt.StarvedTimeout / starvedChecks)
	defer tick.Stop()
	return c.srv.memory.get(c.ctx, n, tick.C, c.starved)
}

// giveBack ends the use of what buffer returned.
func (c *serverConn) giveBack(b *buffer) {
	c.bufs.Add(-1)
	c.srv.memory.put(b)
}

// start runs f, which replies to a request, on a goroutine of its own. The
// reply must hold the slot.
func (c *serverConn) start(f func()) error {
	if err := c.acquireSlot(); err != nil {
		return err
	}
	c.tasks.Go(f)
	return nil
}

// alone reports whether no other request is in flight or has arrived.
func (c *serverConn) alone() bool { return len(c.slots) == 0 && c.in.buffered() == 0 }
