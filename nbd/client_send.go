package nbd

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

const (
	// clientBatch bounds how many bytes of requests are collected for one
	// system call, and maxBatch how many requests. One more may go beyond it.
	clientBatch = 1 << 20
	maxBatch    = 256
	// maxVectors bounds the buffers of one system call: IOV_MAX, writev(2).
	maxVectors = 1024
	// maxRounds is how many batches a caller sends of which only the first has
	// its own request.
	maxRounds = 4
	// leaveTimeout is how long Close tries to say goodbye.
	leaveTimeout = 100 * time.Millisecond
)

// call is one request and what becomes of it. The connection's mutex guards it
// from submit until it is done.
type call struct {
	req      request
	payload  [3][]byte // of a write, one after the other
	dst      []byte    // of a read, unless sink is set
	sink     func(off, n int64, p []byte) error
	from, to uint64    // what is wanted of the blocks that are read
	on       *instance // the only one that it may be sent to; nil: any
	mark     uint64    // of a flush: it covers the writes acknowledged before
	deadline time.Time // zero: IOTimeout from now on

	extents []statusExtent // of a block status
	got     int64          // bytes of a read
	err     error          // the server's, or sink's

	sentAt    time.Time
	state     callState
	replied   bool // result came while the payload was being sent
	result    error
	receiving bool          // the reader is busy with dst or sink
	abandoned bool          // nobody waits: drop what arrives
	slot      chan struct{} // that it occupies; once abandoned, until it is answered or lost
	done      chan error
	timer     *time.Timer
}

// callState is where the bytes of a request are.
type callState uint8

const (
	callQueued  callState = iota // the server can't have it
	callSending                  // the payload is in a system call
	callSent                     // the caller's buffers are free
)

func newCall() *call {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &call{done: make(chan error, 1), timer: t}
}

// outbox is what a connection has to send. The connection's mutex guards it;
// the batch is whose turn it is to send.
type outbox struct {
	pending []*call
	bytes   int           // of pending
	room    chan struct{} // closed when pending has room again; nil: nobody waits
	sending bool          // somebody owns the batch
	recall  bool          // who owns it is to let go of the calls given up
	batch   sendBatch
}

// sendBatch is requests on their way into system calls.
type sendBatch struct {
	heads  []byte // appended to only within its capacity, since vecs point into it
	vecs   [][]byte
	owners []*call // by vec; nil: a head
	next   int     // vec
	calls  []*call // those with a payload; others may be answered and gone

	raw   syscall.RawConn // nil: only Write works
	tries func(fd uintptr) bool
	err   error // of tries
}

func (o *outbox) init(nc net.Conn) {
	b := &o.batch
	b.heads = make([]byte, 0, maxBatch*requestLen)
	b.tries = b.write
	var raw syscall.RawConn
	var err error
	switch s := nc.(type) { // not a type that embeds them, whose Write counts
	case *net.TCPConn:
		raw, err = s.SyscallConn()
	case *net.UnixConn:
		raw, err = s.SyscallConn()
	}
	if err == nil {
		b.raw = raw
	}
}

func (o *outbox) full() bool { return len(o.pending) >= maxBatch || o.bytes >= clientBatch }

func (o *outbox) add(k *call) {
	k.state = callQueued
	o.pending = append(o.pending, k)
	o.bytes += k.wireLen()
}

func (o *outbox) remove(k *call) {
	if i := slices.Index(o.pending, k); i >= 0 {
		o.pending = slices.Delete(o.pending, i, i+1)
		o.bytes -= k.wireLen()
		o.makeRoom()
	}
}

func (o *outbox) drop() {
	clear(o.pending)
	o.pending, o.bytes = o.pending[:0], 0
	o.makeRoom()
}

func (o *outbox) makeRoom() {
	if o.room != nil && !o.full() {
		close(o.room)
		o.room = nil
	}
}

func (k *call) wireLen() int {
	n := requestLen
	for _, p := range k.payload {
		n += len(p)
	}
	return n
}

// load makes a batch of what is pending. It reports whether there is anything
// to send.
func (o *outbox) load() bool {
	b := &o.batch
	if b.next < len(b.vecs) {
		return true
	}
	clear(b.vecs)
	clear(b.owners)
	b.heads, b.vecs, b.owners, b.next = b.heads[:0], b.vecs[:0], b.owners[:0], 0
	for _, k := range o.pending {
		b.add(k)
	}
	o.drop()
	return len(b.vecs) > 0
}

func (b *sendBatch) add(k *call) {
	n := len(b.heads)
	b.heads = appendRequest(b.heads, k.req)
	if last := len(b.vecs) - 1; last >= 0 && b.owners[last] == nil {
		first := n - len(b.vecs[last]) // headers in a row are one vector
		b.vecs[last] = b.heads[first:]
	} else {
		b.vecs, b.owners = append(b.vecs, b.heads[n:]), append(b.owners, nil)
	}
	k.state = callSent
	for _, p := range k.payload {
		if len(p) > 0 {
			k.state = callSending
			b.vecs, b.owners = append(b.vecs, p), append(b.owners, k)
		}
	}
	if k.state == callSending {
		b.calls = append(b.calls, k)
	}
}

// try sends what the socket takes without waiting, and reports whether that is
// all.
func (b *sendBatch) try() (all bool, err error) {
	if b.raw == nil {
		return false, nil
	}
	b.err = nil
	if err := b.raw.Write(b.tries); err != nil && !isTimeout(err) { // a recall
		return false, err
	}
	return b.next == len(b.vecs), b.err
}

func (b *sendBatch) write(fd uintptr) bool {
	v := b.vecs[b.next:]
	v = v[:min(len(v), maxVectors)]
	var n int
	for b.err = unix.EINTR; errors.Is(b.err, unix.EINTR); {
		if len(v) == 1 {
			n, b.err = unix.Write(int(fd), v[0])
		} else {
			n, b.err = unix.Writev(int(fd), v)
		}
	}
	if errors.Is(b.err, unix.EAGAIN) {
		b.err = nil
		return true // or the caller would wait
	}
	for n > 0 && b.next < len(b.vecs) {
		k := min(n, len(b.vecs[b.next]))
		n -= k
		if b.vecs[b.next] = b.vecs[b.next][k:]; len(b.vecs[b.next]) == 0 {
			b.next++
		}
	}
	return true
}

// wait sends all of the batch, or what it can before an error.
func (b *sendBatch) wait(nc net.Conn) error {
	out := net.Buffers(b.vecs[b.next:])
	_, err := out.WriteTo(nc)
	b.next = len(b.vecs) - len(out)
	return err
}

// submit sends a call, or leaves it to whoever is sending. Who finds nobody
// sending sends all there is, so many small requests share a system call and a
// single one waits for nobody. It never waits for the network: where the socket
// is full, a goroutine goes on, and where too much waits for that, a channel is
// returned that is closed when there is room.
func (cc *clientConn) submit(k *call) (room <-chan struct{}, err error) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if cc.err != nil {
		return nil, errConnLost
	}
	if cc.out.sending && cc.out.full() {
		if cc.out.room == nil {
			cc.out.room = make(chan struct{})
		}
		return cc.out.room, nil
	}
	if len(cc.calls) == 0 {
		cc.lastHeard.Store(cc.c.now())
	}
	cc.cookie++
	k.req.cookie = cc.cookie
	k.sentAt = time.Now()
	if k.req.typ == cmdFlush {
		k.mark = cc.c.losses.mark()
	}
	cc.calls[cc.cookie] = k
	cc.bytes.Add(int64(k.req.length))
	cc.out.add(k)
	if !cc.out.sending {
		cc.sendLocked()
	}
	return nil, nil
}

// sendLocked sends what is pending, as far as that needs no waiting. It
// releases the mutex meanwhile. The goroutine that may go on is waited for by
// maintain, and so by Close: a connection is not over before sending has ended.
func (cc *clientConn) sendLocked() {
	cc.out.sending = true
	for round := 0; cc.err == nil && cc.out.load(); round++ {
		if round == maxRounds { // the caller has waited for others long enough
			cc.c.wg.Go(cc.sendRest)
			return
		}
		cc.mu.Unlock()
		all, err := cc.out.batch.try()
		cc.mu.Lock()
		if cc.sentLocked(err); err == nil && !all {
			cc.c.wg.Go(cc.sendRest)
			return
		}
	}
	cc.endSendingLocked()
}

// sendRest sends until nothing is pending.
func (cc *clientConn) sendRest() {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	for cc.err == nil && cc.out.load() {
		cc.mu.Unlock()
		err := cc.out.batch.wait(cc.nc)
		cc.mu.Lock()
		if cc.out.recall && isTimeout(err) {
			err = nil
		}
		cc.sentLocked(err)
	}
	cc.endSendingLocked()
}

// sentLocked is called after each system call that sends.
func (cc *clientConn) sentLocked(err error) {
	if err != nil {
		cc.failLocked(fmt.Errorf("send: %w", err))
	}
	b := &cc.out.batch
	if b.next == len(b.vecs) {
		cc.releaseLocked(func(*call) bool { return true })
	}
	if !cc.out.recall {
		return
	}
	cc.out.recall = false
	_ = cc.nc.SetWriteDeadline(time.Time{}) // an error shows at the next write
	// Half of a request can't be taken back. The rest of it is copied, so that
	// the caller has its buffer again and the connection lives on.
	for i, k := range b.owners {
		if i >= b.next && k != nil && k.abandoned {
			b.vecs[i] = slices.Clone(b.vecs[i])
		}
	}
	cc.releaseLocked(func(k *call) bool { return k.abandoned })
}

// releaseLocked says of calls in the batch that their buffers are free.
func (cc *clientConn) releaseLocked(which func(*call) bool) {
	b := &cc.out.batch
	b.calls = slices.DeleteFunc(b.calls, func(k *call) bool {
		if !which(k) {
			return false
		}
		k.state = callSent
		if k.replied {
			k.done <- k.result
		}
		return true
	})
	cc.quiet.Broadcast()
}

func (cc *clientConn) endSendingLocked() {
	b := &cc.out.batch
	b.next = len(b.vecs) // what is left of it when the connection has failed
	cc.releaseLocked(func(*call) bool { return true })
	cc.out.sending = false
	cc.quiet.Broadcast()
}

// settleSendingLocked waits until the fate of every payload is known that was
// to be sent when the connection broke.
func (cc *clientConn) settleSendingLocked() {
	for cc.out.sending {
		cc.quiet.Wait()
	}
}

// abandon gives a call up. When it returns nobody touches the call's buffers
// any more, and the connection goes on. It reports whether there is a result
// after all, and which; and whether the call keeps its slot, since the server
// has it and owes an answer.
func (cc *clientConn) abandon(k *call) (answered, keeps bool, err error) {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	k.abandoned = true
	keeps = cc.calls[k.req.cookie] == k
	if keeps && k.state == callQueued {
		cc.out.remove(k)
		delete(cc.calls, k.req.cookie)
		cc.bytes.Add(-int64(k.req.length))
		return false, false, nil
	}
	if keeps && k.req.modifies() {
		cc.c.fences.giveUp(k, cc)
	}
	if k.state == callSending {
		cc.out.recall = true
		_ = cc.nc.SetWriteDeadline(time.Unix(1, 0)) // wakes who sends
	}
	if k.receiving {
		cc.stopped = true
		_ = cc.nc.SetReadDeadline(time.Unix(1, 0)) // wakes the reader
	}
	for k.state == callSending || k.receiving {
		cc.quiet.Wait()
	}
	if cc.calls[k.req.cookie] != k {
		return true, keeps, <-k.done
	}
	return false, keeps, nil
}

// leave says goodbye and ends the connection.
func (cc *clientConn) leave() {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	if cc.out.sending || cc.err != nil {
		cc.failLocked(memferry.ErrClosed)
		return
	}
	cc.err = memferry.ErrClosed
	cc.out.sending = true // nothing else is sent, and the end of it is waited for
	cc.mu.Unlock()
	if t, ok := cc.nc.(*net.TCPConn); ok {
		_ = t.SetLinger(-1) // a reset could overtake the goodbye
	}
	_ = cc.nc.SetWriteDeadline(time.Now().Add(leaveTimeout))
	_, _ = cc.nc.Write(appendRequest(nil, request{typ: cmdDisc}))
	_ = cc.nc.Close() // wakes the reader
	cc.mu.Lock()
	cc.endSendingLocked()
}
