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
	// clientBatch bounds how many bytes of requests go into one system call.
	clientBatch = 1 << 20
	// leaveTimeout is how long Close tries to say goodbye.
	leaveTimeout = 100 * time.Millisecond
)

// call is one request and what becomes of it. The connection's mutex guards it
// from submit until it is done.
type call struct {
	req     request
	payload []byte // of a write
	dst     []byte // of a read, unless sink is set
	sink    func(off, n int64, p []byte) error

	extents []statusExtent // of a block status
	got     int64          // bytes of a read
	err     error          // the server's, or sink's

	sentAt    time.Time
	unsent    bool // payload is not yet in the kernel's hands
	replied   bool // result came before that was so
	result    error
	receiving bool // the reader is busy with dst or sink
	abandoned bool // nobody waits: drop what arrives
	done      chan error
	timer     *time.Timer
}

func newCall() *call {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &call{done: make(chan error, 1), timer: t}
}

var errHalfWay = errors.New("gave up a request half-way")

// clientConn is one connection in the transmission phase.
type clientConn struct {
	c            *Client
	nc           net.Conn
	in           *bufio.Reader
	info         ExportInfo
	allocationID uint32
	id           string
	fenceable    bool // by its id

	bytes     atomic.Int64 // in flight
	lastReply atomic.Int64 // UnixNano of the last bytes of a reply
	lastHeard atomic.Int64 // of those or, after idleness, of a request

	mu      sync.Mutex
	calls   map[uint64]*call
	cookie  uint64
	pending clientQueue
	spare   clientQueue
	sending bool
	quiet   sync.Cond // sending has ended
	err     error     // why the connection is over

	piece []byte // of the reader
}

// clientQueue is a batch of requests on their way into one system call.
type clientQueue struct {
	heads []byte // appended to only within its capacity, since vecs point into it
	vecs  [][]byte
	calls []*call // those with a payload
	bytes int
}

const queueHeads = 256 * requestLen

func newClientConn(h *clientHandshake) *clientConn {
	cc := &clientConn{nc: h.nc, in: h.in, info: h.info, allocationID: h.allocationID, id: h.as.id, fenceable: h.info.fences, calls: map[uint64]*call{}}
	cc.quiet.L = &cc.mu
	cc.pending.heads = make([]byte, 0, queueHeads)
	cc.spare.heads = make([]byte, 0, queueHeads)
	return cc
}

// submit sends a call, or leaves it to the goroutine that is sending. Whoever
// finds nobody sending sends all there is, so many small requests share a
// system call and a single one waits for nobody.
func (cc *clientConn) submit(k *call) error {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	for cc.err == nil && cc.sending && cc.pending.full() {
		cc.quiet.Wait()
	}
	if cc.err != nil {
		return errConnLost
	}
	if len(cc.calls) == 0 {
		cc.lastHeard.Store(time.Now().UnixNano())
	}
	cc.cookie++
	k.req.cookie = cc.cookie
	k.sentAt = time.Now()
	k.unsent = len(k.payload) > 0
	cc.calls[cc.cookie] = k
	cc.bytes.Add(int64(k.req.length))
	cc.pending.add(k)
	if !cc.sending {
		cc.sendLocked()
	}
	return nil
}

func (q *clientQueue) full() bool {
	return q.bytes >= clientBatch || len(q.heads)+requestLen > cap(q.heads)
}

func (q *clientQueue) add(k *call) {
	n := len(q.heads)
	q.heads = appendRequest(q.heads, k.req)
	head := q.heads[n:]
	if last := len(q.vecs) - 1; last >= 0 && len(q.calls) == 0 {
		q.vecs[last] = q.heads[:] // headers alone stay one vector
	} else {
		q.vecs = append(q.vecs, head)
	}
	q.bytes += len(head) + len(k.payload)
	if len(k.payload) > 0 {
		q.vecs = append(q.vecs, k.payload)
		q.calls = append(q.calls, k)
	}
}

func (q *clientQueue) reset() {
	clear(q.vecs)
	clear(q.calls)
	*q = clientQueue{heads: q.heads[:0], vecs: q.vecs[:0], calls: q.calls[:0]}
}

// sendLocked sends until nothing is pending. It releases the mutex while it
// writes.
func (cc *clientConn) sendLocked() {
	cc.sending = true
	for cc.err == nil && len(cc.pending.vecs) > 0 {
		cc.pending, cc.spare = cc.spare, cc.pending
		cc.quiet.Broadcast() // there is room again
		q := &cc.spare
		cc.mu.Unlock()
		out := net.Buffers(q.vecs)
		_, err := out.WriteTo(cc.nc)
		cc.mu.Lock()
		for _, k := range q.calls {
			k.unsent = false
			if k.replied {
				k.done <- k.result
			}
		}
		q.reset()
		if err != nil {
			cc.failLocked(fmt.Errorf("send: %w", err))
		}
	}
	cc.sending = false
	cc.quiet.Broadcast()
}

// abandon gives a call up. When it returns nobody touches the call's buffers
// any more. It reports whether there is a result after all, and which.
func (cc *clientConn) abandon(k *call) (answered bool, err error) {
	cc.mu.Lock()
	if _, ok := cc.calls[k.req.cookie]; !ok {
		if k.unsent {
			cc.failLocked(errHalfWay)
		}
		cc.mu.Unlock()
		return true, <-k.done
	}
	k.abandoned = true
	if k.req.modifies() {
		cc.c.fences.giveUp(k, cc)
	}
	if !k.unsent && !k.receiving {
		cc.mu.Unlock()
		return false, nil
	}
	// Its buffer is in a system call: only the end of the connection frees it.
	cc.failLocked(errHalfWay)
	cc.mu.Unlock()
	<-k.done //nolint:errcheck // the loss that was just caused
	return false, nil
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

// leave says goodbye and ends the connection.
func (cc *clientConn) leave() {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if !cc.sending && cc.err == nil {
		if t, ok := cc.nc.(*net.TCPConn); ok {
			_ = t.SetLinger(-1) // a reset could overtake the goodbye
		}
		_ = cc.nc.SetWriteDeadline(time.Now().Add(leaveTimeout))
		_, _ = cc.nc.Write(appendRequest(nil, request{typ: cmdDisc}))
	}
	cc.failLocked(memferry.ErrClosed)
}

// heard notes that the server has sent something.
func (cc *clientConn) heard() {
	now := time.Now().UnixNano()
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
	return time.Since(time.Unix(0, cc.lastHeard.Load()))
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

// settleSendingLocked waits until the fate of every payload is known that was
// to be sent when the connection broke.
func (cc *clientConn) settleSendingLocked() {
	for cc.sending {
		cc.quiet.Wait()
	}
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
		k.done <- errConnLost
	}
	for _, k := range cc.pending.calls {
		if k.replied {
			k.done <- errConnLost
		}
	}
	cc.pending.reset()
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
	if k == nil {
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
	delete(cc.calls, k.req.cookie)
	cc.bytes.Add(-int64(k.req.length))
	err := k.err
	if err == nil && k.req.typ == cmdRead && k.got != int64(k.req.length) {
		err = protocolErrorf("%d bytes for a read of %d", k.got, k.req.length)
	}
	if err == nil && k.req.modifies() {
		// Here, and not where the caller wakes up: when the connection breaks
		// it has to be known.
		cc.c.acked.Add(1)
		if cc.info.instance != "" {
			cc.c.checkInstance(cc)
		}
	}
	if k.abandoned && k.req.modifies() {
		cc.c.fences.answered(k)
	}
	if k.unsent { // the caller may not have its buffer back yet
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
		if k.sink != nil {
			return k.note(k.sink(int64(off), int64(n), nil))
		}
		clear(k.dst[off-k.req.offset:][:n])
		return nil
	}, func() error { return nil })
}

// data delivers n bytes of payload.
func (cc *clientConn) data(k *call, off uint64, n uint32) error {
	return cc.deliver(k, off, n, func() error {
		if k.sink != nil {
			return cc.stream(k, int64(off), int64(n))
		}
		// In pieces: over a slow link each of them is a sign of life.
		for p := k.dst[off-k.req.offset:][:n]; len(p) > 0; {
			piece := p[:min(len(p), streamPiece)]
			if _, err := io.ReadFull(cc.in, piece); err != nil {
				return err
			}
			cc.heard()
			p = p[len(piece):]
		}
		return nil
	}, func() error {
		_, err := io.CopyN(io.Discard, cc.in, int64(n))
		return err
	})
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
	k.receiving = false
	cc.mu.Unlock()
	return err
}

// note keeps the first error of the sink; the connection goes on.
func (k *call) note(err error) error {
	if k.err == nil {
		k.err = err
	}
	return nil
}

// stream passes a payload on in pieces.
func (cc *clientConn) stream(k *call, off, n int64) error {
	if cc.piece == nil {
		cc.piece = make([]byte, streamPiece)
	}
	for n > 0 {
		p := cc.piece[:min(n, streamPiece)]
		if _, err := io.ReadFull(cc.in, p); err != nil {
			return err
		}
		if k.err == nil {
			k.err = k.sink(off, int64(len(p)), p)
		}
		off += int64(len(p))
		n -= int64(len(p))
		cc.heard()
	}
	return nil
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
