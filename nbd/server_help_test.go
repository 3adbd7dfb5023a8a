package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// hang bounds what must happen soon; only a hang takes that long.
const hang = 20 * time.Second

// plain is a backend in memory that can do nothing beyond the contract.
type plain struct {
	mu     sync.Mutex
	data   []byte
	syncs  atomic.Int64
	writes atomic.Int64
}

func newPlain(size int) *plain { return &plain{data: make([]byte, size)} }

// newPattern is newPlain with content that tells every byte's place.
func newPattern(size int) *plain {
	p := newPlain(size)
	for i := range p.data {
		p.data[i] = byte(i) ^ byte(i>>8) ^ byte(i>>16)
	}
	return p
}

func (m *plain) ReadAt(p []byte, off int64) (int, error) {
	n, err := memferry.CheckRead(off, len(p), m.Size())
	m.mu.Lock()
	defer m.mu.Unlock()
	if n > 0 {
		copy(p, m.data[off:off+int64(n)])
	}
	return n, err
}

func (m *plain) WriteAt(p []byte, off int64) (int, error) {
	if err := memferry.CheckRange("write", off, int64(len(p)), m.Size()); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes.Add(1)
	return copy(m.data[off:], p), nil
}

func (m *plain) Size() int64  { return int64(len(m.data)) }
func (m *plain) Sync() error  { m.syncs.Add(1); return nil }
func (m *plain) Close() error { return nil }

func (m *plain) bytes(off, n int) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.data[off : off+n])
}

// able is plain with the capabilities of storage, and its pages' holes.
type able struct {
	*plain
	gen     atomic.Pointer[string]
	trimmed atomic.Int64
	zeroErr error // under mu
	lastZ   atomic.Int64
}

func newAble(size int) *able {
	a := &able{plain: newPattern(size)}
	g := "g1"
	a.gen.Store(&g)
	return a
}

func (a *able) Trim(_, n int64) error { a.trimmed.Add(n); return nil }

func (a *able) WriteZeroes(off, n int64, f memferry.ZeroFlags) error {
	a.lastZ.Store(int64(f))
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.zeroErr != nil {
		return a.zeroErr
	}
	clear(a.data[off : off+n])
	return nil
}

// Extents calls a page of zeroes a hole.
func (a *able) Extents(_ context.Context, off, n int64) ([]memferry.Extent, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []memferry.Extent
	for end := off + n; off < end && len(out) < 7; {
		next := min((off/memferry.PageSize+1)*memferry.PageSize, end)
		e := memferry.Extent{Off: off, Len: next - off}
		if len(bytes.Trim(a.data[off:next], "\x00")) == 0 {
			e.Flags = memferry.ExtentHole | memferry.ExtentZero
		}
		out = append(out, e)
		off = next
	}
	return out, nil
}

func (a *able) Generation(context.Context) (string, error) { return *a.gen.Load(), nil }

// viewed is able that is mapped memory.
type viewed struct {
	*able
	views atomic.Int64 // not released
}

func newViewed(size int) *viewed { return &viewed{able: newAble(size)} }

func (v *viewed) View(off, n int64) ([]byte, error) {
	if err := memferry.CheckRange("view", off, n, v.Size()); err != nil {
		return nil, err
	}
	v.views.Add(1)
	v.barrier()
	return v.data[off : off+n], nil
}

func (v *viewed) ViewForWrite(off, n int64) ([]byte, error) {
	v.writes.Add(1)
	return v.View(off, n)
}

func (v *viewed) ReleaseView() {
	v.barrier()
	v.views.Add(-1)
}

// barrier tells the race detector, which does not see that data went through a
// vectored read or write of a socket, what came before what.
func (v *viewed) barrier() {
	v.mu.Lock()
	defer v.mu.Unlock()
}

// stuck is plain of which some operations wait until they are let go.
type stuck struct {
	*plain
	at      int64         // reads and writes here wait
	entered chan struct{} // gets one for each that waits
	release chan struct{} // closed to let them go
}

func newStuck(size int, at int64) *stuck {
	return &stuck{plain: newPattern(size), at: at, entered: make(chan struct{}, 1000), release: make(chan struct{})}
}

func (s *stuck) wait(off int64) {
	if off == s.at {
		s.entered <- struct{}{}
		<-s.release
	}
}

func (s *stuck) ReadAt(p []byte, off int64) (int, error) {
	s.wait(off)
	return s.plain.ReadAt(p, off)
}

func (s *stuck) WriteAt(p []byte, off int64) (int, error) {
	s.wait(off)
	return s.plain.WriteAt(p, off)
}

// broken is plain whose operations fail.
type broken struct {
	*plain
	err error
}

func (b *broken) ReadAt([]byte, int64) (int, error)  { return 0, b.err }
func (b *broken) WriteAt([]byte, int64) (int, error) { return 0, b.err }
func (b *broken) Sync() error                        { return b.err }

// wire is a client that knows nothing but the codec.
type wire struct {
	t    testing.TB
	nc   net.Conn
	done chan error // the server's verdict on the connection
}

// startServer serves exports until the test ends.
func startServer(t testing.TB, o ServerOptions, exports ...Export) *Server {
	t.Helper()
	s := NewServer(o)
	for _, e := range exports {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// connect makes a client of s, over a UNIX socket.
func connect(t testing.TB, s *Server) *wire {
	t.Helper()
	return connectOver(t, s, "unix", testenv.TempSocket(t))
}

// connectOver makes a client of s that listens on an address for that.
func connectOver(t testing.TB, s *Server, network, addr string) *wire {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return attach(t, s, nc, peer)
}

// connectPipe makes a client of s over a connection without a descriptor.
func connectPipe(t testing.TB, s *Server) *wire {
	t.Helper()
	nc, peer := net.Pipe()
	return attach(t, s, nc, peer)
}

func attach(t testing.TB, s *Server, nc, peer net.Conn) *wire {
	w := &wire{t: t, nc: nc, done: make(chan error, 1)}
	go func() { w.done <- s.ServeConn(context.Background(), peer) }()
	if err := nc.SetDeadline(time.Now().Add(hang)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	return w
}

func (w *wire) write(b []byte) {
	w.t.Helper()
	if _, err := w.nc.Write(b); err != nil {
		w.t.Fatalf("client write: %v", err)
	}
}

func (w *wire) read(n int) []byte {
	w.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(w.nc, b); err != nil {
		w.t.Fatalf("client read of %d bytes: %v", n, err)
	}
	return b
}

// hello exchanges the greetings.
func (w *wire) hello() *wire {
	w.t.Helper()
	if _, err := parseGreeting(w.read(greetingLen)); err != nil {
		w.t.Fatal(err)
	}
	w.write(appendClientFlags(nil, flagClientFixedNewstyle|flagClientNoZeroes))
	return w
}

type optionReply struct {
	typ  uint32
	data []byte
}

// option sends an option and returns its replies, the final one included.
func (w *wire) option(option uint32, data []byte) []optionReply {
	w.t.Helper()
	w.write(appendOption(nil, option, data))
	var all []optionReply
	for {
		h, err := parseOptionReplyHeader(w.read(optionReplyHeaderLen))
		if err != nil {
			w.t.Fatal(err)
		}
		if h.option != option {
			w.t.Fatalf("reply to %s, asked for %s", optionName(h.option), optionName(option))
		}
		all = append(all, optionReply{h.typ, w.read(int(h.length))})
		if h.typ == repAck || h.isError() {
			return all
		}
	}
}

// final is option for those of which only the last reply matters.
func (w *wire) final(option uint32, data []byte) uint32 {
	w.t.Helper()
	r := w.option(option, data)
	return r[len(r)-1].typ
}

// enter negotiates: structured replies and contexts if wanted, then GO.
func (w *wire) enter(name string, structured bool, contexts ...string) (size uint64, flags TransmissionFlags) {
	w.t.Helper()
	w.hello()
	if structured && w.final(optStructuredReply, nil) != repAck {
		w.t.Fatal("no structured replies")
	}
	if len(contexts) > 0 {
		w.option(optSetMetaContext, appendMetaRequest(nil, metaRequest{name, contexts}))
	}
	replies := w.option(optGo, appendInfoRequest(nil, infoRequest{name: name}))
	if typ := replies[len(replies)-1].typ; typ != repAck {
		w.t.Fatalf("GO: reply %#x", typ)
	}
	e, err := parseInfoExport(replies[0].data)
	if err != nil {
		w.t.Fatal(err)
	}
	return e.size, e.flags
}

func (w *wire) send(rq request, payload ...byte) {
	w.t.Helper()
	w.write(append(appendRequest(nil, rq), payload...))
}

// answer is one reply, put together from its chunks.
type answer struct {
	cookie  uint64
	errno   Errno
	message string
	offset  uint64                    // of data, in structured replies
	data    []byte                    // of a read, holes filled in
	holes   int                       // chunks
	status  map[uint32][]statusExtent // by context ID
	simple  bool
}

// receive reads one reply; for a simple reply to a read, n is the data's
// length.
func (w *wire) receive(n int) answer {
	w.t.Helper()
	a := answer{status: map[uint32][]statusExtent{}}
	for {
		head := w.read(simpleReplyLen)
		if replyMagic(head) == magicSimpleReply {
			r, err := parseSimpleReply(head)
			if err != nil {
				w.t.Fatal(err)
			}
			a.cookie, a.errno, a.simple = r.cookie, r.err, true
			if r.err == 0 && n > 0 {
				a.data = w.read(n)
			}
			return a
		}
		h, err := parseChunkHeader(append(head, w.read(chunkHeaderLen-simpleReplyLen)...))
		if err != nil {
			w.t.Fatal(err)
		}
		a.cookie = h.cookie
		w.addChunk(&a, h, w.read(int(h.length)))
		if h.done() {
			return a
		}
	}
}

func (w *wire) addChunk(a *answer, h chunkHeader, p []byte) {
	w.t.Helper()
	switch h.typ {
	case chunkNone:
	case chunkOffsetData:
		w.checkOffset(a, parseOffsetData(p))
		a.data = append(a.data, p[offsetDataLen:]...)
	case chunkOffsetHole:
		off, n, err := parseOffsetHole(p)
		if err != nil {
			w.t.Fatal(err)
		}
		w.checkOffset(a, off)
		a.data = append(a.data, make([]byte, n)...)
		a.holes++
	case chunkBlockStatus:
		id, e, err := parseBlockStatus(p)
		if err != nil {
			w.t.Fatal(err)
		}
		a.status[id] = e
	default:
		if !h.isError() {
			w.t.Fatalf("chunk of type %d", h.typ)
		}
		c, err := parseErrorChunk(h.typ, p)
		if err != nil {
			w.t.Fatal(err)
		}
		a.errno, a.message = c.err, c.message
	}
}

// checkOffset requires that content continues where it ended.
func (w *wire) checkOffset(a *answer, off uint64) {
	w.t.Helper()
	if len(a.data) == 0 {
		a.offset = off
	}
	if want := a.offset + uint64(len(a.data)); off != want {
		w.t.Errorf("content at %d, want %d", off, want)
	}
}

// ask sends a request and returns its reply.
func (w *wire) ask(rq request, payload ...byte) answer {
	w.t.Helper()
	rq.cookie = 0xfeed<<32 | uint64(rq.typ)
	w.send(rq, payload...)
	n := 0
	if rq.typ == cmdRead {
		n = int(rq.length)
	}
	a := w.receive(n)
	if !a.simple && len(a.data) > 0 && a.offset != rq.offset {
		w.t.Errorf("content from %d, asked for %d", a.offset, rq.offset)
	}
	if a.cookie != rq.cookie {
		w.t.Fatalf("%s: cookie %#x, want %#x", commandName(rq.typ), a.cookie, rq.cookie)
	}
	return a
}

// ends waits for the server to close the connection, and returns its verdict.
func (w *wire) ends() error {
	w.t.Helper()
	if n, err := io.Copy(io.Discard, w.nc); err != nil && !errors.Is(err, net.ErrClosed) {
		w.t.Logf("after %d more bytes: %v", n, err)
	}
	select {
	case err := <-w.done:
		return err
	case <-time.After(hang):
		w.t.Fatal("the server keeps the connection")
		return nil
	}
}

// disconnect leaves as the protocol wants it.
func (w *wire) disconnect() {
	w.t.Helper()
	w.send(request{typ: cmdDisc})
	if err := w.ends(); err != nil {
		w.t.Errorf("after DISC: %v", err)
	}
}
