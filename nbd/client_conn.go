package nbd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/memferry/memferry"
)

const (
	// streamPiece is how much of a streamed read is passed on at a time.
	streamPiece = 256 << 10
	// maxStatusPayload bounds how much of a block status is kept; extents past
	// it are dropped, and asked for again.
	maxStatusPayload = 4 + statusExtentLen*memferry.MaxExtents
)

// clientConn is one connection in the transmission phase.
type clientConn struct {
	c            *Client
	nc           net.Conn
	in           *bufio.Reader
	info         ExportInfo
	allocationID uint32
	id           string
	fenceable    bool // by its id
	instance     *instance

	bytes     atomic.Int64 // in flight
	lastReply atomic.Int64 // Client.now at the last bytes of a reply
	lastHeard atomic.Int64 // of those or, after idleness, of a request

	mu      sync.Mutex
	calls   map[uint64]*call // bounded by the client's slots, also those given up
	cookie  uint64
	out     outbox
	quiet   sync.Cond // a call's buffers came free, or sending has ended
	stopped bool      // the reader is to let go of the call that it receives for
	err     error     // why the connection is over

	piece []byte // of the reader
}

func newClientConn(h *clientHandshake) *clientConn {
	cc := &clientConn{nc: h.nc, in: h.in, info: h.info, allocationID: h.allocationID, id: h.as.id, fenceable: h.info.fences, calls: map[uint64]*call{}}
	cc.quiet.L = &cc.mu
	cc.out.init(h.nc)
	return cc
}

// fail ends the connection.
func (cc *clientConn) fail(err error) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	cc.failLocked(err)
}

func (cc *clientConn) failLocked(err error) {
	if cc.err == nil {
		cc.err = err
		_ = cc.nc.Close() // wakes the reader, which tells everybody
	}
}

// heard notes that the server has sent something.
func (cc *clientConn) heard() {
	now := cc.c.now()
	cc.lastReply.Store(now)
	cc.lastHeard.Store(now)
}

// silent returns for how long an answer is overdue.
func (cc *clientConn) silent() time.Duration {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if len(cc.calls) == 0 {
		return 0
	}
	return cc.c.since(&cc.lastHeard)
}

// run reads replies until the connection ends, and returns why it did. The
// calls without an answer are left to finishAll.
func (cc *clientConn) run() error {
	for {
		if err := cc.readReply(); err != nil {
			cc.fail(err)
			return cc.reason()
		}
	}
}

// reason returns why the connection is over.
func (cc *clientConn) reason() error {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	return cc.err
}

// finishAll tells the callers of requests that they were lost. Those that are
// given up are told whatever they are: at most the end of the buffer's use is
// waited for.
func (cc *clientConn) finishAll(which func(*call) bool) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	cc.settleSendingLocked()
	for cookie, k := range cc.calls {
		if !k.abandoned && !which(k) {
			continue
		}
		delete(cc.calls, cookie)
		if k.abandoned {
			cc.c.release(k)
		}
		k.done <- errConnLost
	}
	cc.out.drop()
	cc.bytes.Store(0)
}

func (cc *clientConn) readReply() error {
	b, err := cc.in.Peek(4)
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	cc.heard()
	switch replyMagic(b) {
	case magicSimpleReply:
		return cc.simpleReply()
	case magicStructuredReply:
		if !cc.info.Structured {
			return protocolErrorf("structured reply, though none were agreed on")
		}
		return cc.chunk()
	}
	return protocolErrorf("reply magic %#x", replyMagic(b))
}

func (cc *clientConn) find(cookie uint64) (*call, error) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	k := cc.calls[cookie]
	if k == nil || k.state == callQueued {
		return nil, protocolErrorf("reply to a request that was not made")
	}
	return k, nil
}

// finish ends a call.
func (cc *clientConn) finish(k *call) error {
	if errors.Is(k.err, ESHUTDOWN) {
		return k.err // the connection is over; the call is sent again
	}
	cc.mu.Lock()
	defer cc.mu.Unlock()
	err := k.err
	if err == nil && k.req.typ == cmdRead && k.got != int64(k.req.length) {
		err = protocolErrorf("%d bytes for a read of %d", k.got, k.req.length)
	}
	if err == nil {
		// Here, and not where the caller wakes up: when the connection breaks
		// it has to be known.
		cc.c.losses.answered(cc.instance, k)
	}
	delete(cc.calls, k.req.cookie)
	cc.bytes.Add(-int64(k.req.length))
	if k.abandoned {
		if k.req.modifies() {
			cc.c.fences.answered(k)
		}
		cc.c.release(k)
	}
	if k.state == callSending { // the caller may not have its buffer back yet
		k.replied, k.result = true, err
		return nil
	}
	k.done <- err
	return nil
}

// modifies reports whether a FLUSH covers the request.
func (r request) modifies() bool {
	return r.typ == cmdWrite || r.typ == cmdTrim || r.typ == cmdWriteZeroes
}

func (cc *clientConn) simpleReply() error {
	b, err := cc.in.Peek(simpleReplyLen)
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	r, err := parseSimpleReply(b)
	if err != nil {
		return err
	}
	cc.in.Discard(simpleReplyLen) //nolint:errcheck // they were peeked at
	k, err := cc.find(r.cookie)
	if err != nil {
		return err
	}
	switch {
	case k.req.typ == cmdRead && cc.info.Structured:
		return protocolErrorf("simple reply to a read, though structured replies were agreed on")
	case r.err != 0:
		k.err = r.err
	case k.req.typ == cmdRead:
		if err := cc.data(k, k.req.offset, k.req.length); err != nil {
			return err
		}
	}
	return cc.finish(k)
}

// chunk reads one chunk of a structured reply.
func (cc *clientConn) chunk() error {
	b, err := cc.in.Peek(chunkHeaderLen)
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	h, err := parseChunkHeader(b)
	if err != nil {
		return err
	}
	cc.in.Discard(chunkHeaderLen) //nolint:errcheck // they were peeked at
	k, err := cc.find(h.cookie)
	if err != nil {
		return err
	}
	if err := cc.payload(k, h); err != nil {
		return err
	}
	if h.done() {
		return cc.finish(k)
	}
	return nil
}

func (cc *clientConn) payload(k *call, h chunkHeader) error {
	switch {
	case h.typ == chunkNone:
		if h.length != 0 || !h.done() {
			return protocolErrorf("empty chunk of %d bytes", h.length)
		}
		return nil
	case h.isError():
		return cc.errorChunk(k, h)
	case h.typ == chunkOffsetData && k.req.typ == cmdRead:
		return cc.dataChunk(k, h)
	case h.typ == chunkOffsetHole && k.req.typ == cmdRead:
		return cc.holeChunk(k, h)
	case h.typ == chunkBlockStatus && k.req.typ == cmdBlockStatus:
		return cc.statusChunk(k, h)
	}
	return protocolErrorf("chunk of type %d for %s", h.typ, commandName(k.req.typ))
}

// small reads a payload that must not be longer than limit.
func (cc *clientConn) small(h chunkHeader, limit uint32) ([]byte, error) {
	if h.length > limit {
		return nil, protocolErrorf("chunk of type %d with %d bytes", h.typ, h.length)
	}
	p := make([]byte, h.length)
	_, err := io.ReadFull(cc.in, p)
	return p, err
}

func (cc *clientConn) errorChunk(k *call, h chunkHeader) error {
	p, err := cc.small(h, errorChunkLen+maxString+64)
	if err != nil {
		return err
	}
	e, err := parseErrorChunk(h.typ, p)
	if err != nil {
		return err
	}
	if k.err == nil {
		k.err = e.err
		if e.message != "" {
			k.err = fmt.Errorf("%w (server says: %q)", e.err, e.message)
		}
	}
	return nil
}

func (cc *clientConn) dataChunk(k *call, h chunkHeader) error {
	if h.length <= offsetDataLen {
		return protocolErrorf("data chunk of %d bytes", h.length)
	}
	b, err := cc.in.Peek(offsetDataLen)
	if err != nil {
		return err
	}
	off := parseOffsetData(b)
	cc.in.Discard(offsetDataLen) //nolint:errcheck // they were peeked at
	return cc.data(k, off, h.length-offsetDataLen)
}

func (cc *clientConn) holeChunk(k *call, h chunkHeader) error {
	p, err := cc.small(h, offsetHoleLen)
	if err != nil {
		return err
	}
	off, n, err := parseOffsetHole(p)
	if err != nil {
		return err
	}
	return cc.deliver(k, off, n, func() error {
		lo, hi := k.clip(off, uint64(n))
		switch {
		case lo == hi:
		case k.sink == nil:
			clear(k.dst[lo-k.from : hi-k.from])
		case k.err == nil:
			k.err = k.sink(int64(lo), int64(hi-lo), nil)
		}
		return nil
	}, func() error { return nil })
}

// data delivers n bytes of payload.
func (cc *clientConn) data(k *call, off uint64, n uint32) error {
	return cc.deliver(k, off, n,
		func() error { return cc.receive(k, off, uint64(n)) },
		func() error { return cc.discard(uint64(n)) })
}

// clip returns what of n bytes at off is wanted.
func (k *call) clip(off, n uint64) (lo, hi uint64) {
	lo = min(max(off, k.from), off+n)
	return lo, max(min(off+n, k.to), lo)
}

// receive reads n bytes of payload for a call, in pieces: over a slow link each
// of them is a sign of life.
func (cc *clientConn) receive(k *call, off, n uint64) error {
	end := off + n
	lo, hi := k.clip(off, n)
	if err := cc.discard(lo - off); err != nil {
		return err
	}
	for at := lo; at < hi; {
		p := cc.place(k, at, hi)
		m, err := io.ReadFull(cc.in, p)
		at += uint64(m)
		if err != nil {
			if !cc.letGo(k, err) {
				return err
			}
			return cc.discard(end - at)
		}
		cc.heard()
		if k.sink != nil && k.err == nil { // after its error the rest is dropped
			k.err = k.sink(int64(at)-int64(m), int64(m), p)
		}
	}
	return cc.discard(end - hi)
}

// place returns where the next bytes go.
func (cc *clientConn) place(k *call, at, end uint64) []byte {
	n := min(end-at, streamPiece)
	if k.sink == nil {
		return k.dst[at-k.from:][:n]
	}
	if cc.piece == nil {
		cc.piece = make([]byte, streamPiece)
	}
	return cc.piece[:n]
}

// discard reads bytes that nobody wants.
func (cc *clientConn) discard(n uint64) error {
	for n > 0 {
		m, err := cc.in.Discard(int(min(n, streamPiece)))
		if err != nil {
			return err
		}
		cc.heard()
		n -= uint64(m)
	}
	return nil
}

// deliver checks that a part of a read is what was asked for, and lets take
// have it, or drop if nobody wants it any more.
func (cc *clientConn) deliver(k *call, off uint64, n uint32, take, drop func() error) error {
	if off < k.req.offset || uint64(n) > uint64(k.req.length) || off-k.req.offset > uint64(k.req.length-n) {
		return protocolErrorf("%d bytes at %d for a read of %d at %d", n, off, k.req.length, k.req.offset)
	}
	if k.got += int64(n); k.got > int64(k.req.length) {
		return protocolErrorf("more bytes than the read of %d", k.req.length)
	}
	cc.mu.Lock()
	wanted := !k.abandoned && (k.sink == nil || k.err == nil)
	k.receiving = wanted
	cc.mu.Unlock()
	if !wanted {
		return drop()
	}
	err := take()
	cc.mu.Lock()
	cc.receivedLocked(k)
	cc.mu.Unlock()
	return err
}

// letGo reports whether err is how abandon woke the reader. Then the call's
// buffer is free.
func (cc *clientConn) letGo(k *call, err error) bool {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if !cc.stopped || !isTimeout(err) {
		return false
	}
	cc.receivedLocked(k)
	return true
}

// receivedLocked says that the reader is through with a call's buffer.
func (cc *clientConn) receivedLocked(k *call) {
	k.receiving = false
	if cc.stopped {
		cc.stopped = false
		_ = cc.nc.SetReadDeadline(time.Time{}) // an error shows at the next read
	}
	cc.quiet.Broadcast()
}

func (cc *clientConn) statusChunk(k *call, h chunkHeader) error {
	keep := min(h.length, maxStatusPayload)
	if rest := h.length - 4; h.length < 4 || rest%statusExtentLen != 0 {
		return protocolErrorf("block status chunk of %d bytes", h.length)
	}
	p := make([]byte, keep)
	if _, err := io.ReadFull(cc.in, p); err != nil {
		return err
	}
	if _, err := io.CopyN(io.Discard, cc.in, int64(h.length-keep)); err != nil {
		return err
	}
	id, extents, err := parseBlockStatus(p)
	if err == nil && id == cc.allocationID {
		k.extents = extents
	}
	return err
}
