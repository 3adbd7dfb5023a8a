package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// unixPair returns two ends of a UNIX socket.
func unixPair(t testing.TB) func() (net.Conn, net.Conn) {
	l, err := net.Listen("unix", testenv.TempSocket(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return func() (net.Conn, net.Conn) {
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Error(err)
			return net.Pipe()
		}
		server, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		return client, server
	}
}

// byHand is a client of a peer whose connection the test answers by itself.
type byHand struct {
	*Client
	p      *peer
	server net.Conn
	b      [requestLen]byte
}

// eachLink runs f over a pipe, which takes bytes one write at a time, and over
// a socket.
func eachLink(t *testing.T, o ClientOptions, f func(t *testing.T, h *byHand)) {
	for name, pair := range map[string]func() (net.Conn, net.Conn){"pipe": net.Pipe, "socket": unixPair(t)} {
		t.Run(name, func(t *testing.T) {
			p := newPeer()
			p.size, p.content = 64<<20, nil
			p.pair, p.hand = pair, make(chan net.Conn, 16)
			o.IOTimeout, o.Connections = time.Hour, 1 // only what is tested ends a call
			c, err := p.client(o)
			if err != nil {
				t.Fatal(err)
			}
			h := &byHand{Client: c, p: p, server: <-p.hand}
			t.Cleanup(func() {
				h.server.Close()
				c.Close()
			})
			f(t, h)
			if n := p.dials.Load(); n != 1 {
				t.Errorf("%d connections were made: giving up a call broke one", n)
			}
		})
	}
}

// request reads the next one, without its payload.
func (h *byHand) request(t *testing.T) request {
	t.Helper()
	if _, err := io.ReadFull(h.server, h.b[:]); err != nil {
		t.Fatal(err)
	}
	rq, err := parseRequest(h.b[:])
	if err != nil {
		t.Fatalf("the stream of requests is broken: %v", err)
	}
	return rq
}

func (h *byHand) payload(t *testing.T, rq request) []byte {
	t.Helper()
	p := make([]byte, rq.length)
	if _, err := io.ReadFull(h.server, p); err != nil {
		t.Fatal(err)
	}
	return p
}

// answer sends what is no more than a client waits for.
func (h *byHand) answer(t *testing.T, rq request, data []byte) {
	t.Helper()
	if _, err := h.server.Write(append(appendSimpleReply(nil, simpleReply{0, rq.cookie}), data...)); err != nil {
		t.Fatal(err)
	}
}

// soon returns what f does, which must come before the test hangs.
func soon(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(hang):
		t.Fatal("the call hangs")
		return nil
	}
}

// start runs a call in the background.
func start(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

func (h *byHand) write(ctx context.Context, p []byte, off int64) <-chan error {
	return start(func() error { _, err := h.WriteAtContext(ctx, p, off); return err })
}

func (h *byHand) read(ctx context.Context, p []byte, off int64) <-chan error {
	return start(func() error { _, err := h.ReadAtContext(ctx, p, off); return err })
}

// inFlight waits until n requests are.
func (h *byHand) inFlight(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(hang); h.Stats().InFlight != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d requests are in flight, want %d", h.Stats().InFlight, n)
		}
	}
}

// works checks that the connection is as good as ever.
func (h *byHand) works(t *testing.T) {
	t.Helper()
	p := make([]byte, 512)
	done := h.read(t.Context(), p, 4096)
	rq := h.request(t)
	if rq.typ != cmdRead || rq.offset != 4096 {
		t.Fatalf("the server got %+v, want the read of 512 bytes at 4096", rq)
	}
	h.answer(t, rq, filled(7)[:512])
	if err := soon(t, done); err != nil || !bytes.Equal(p, filled(7)[:512]) {
		t.Errorf("a read afterwards: %v, byte %d", err, p[0])
	}
}

// TestCancelWriteHalfWay gives up a write while its payload is on its way to a
// server that does not read. The server gets all of it, as it was, though the
// caller has its buffer again.
func TestCancelWriteHalfWay(t *testing.T) {
	eachLink(t, ClientOptions{}, func(t *testing.T, h *byHand) {
		ctx, cancel := context.WithCancel(t.Context())
		p := bytes.Repeat([]byte{1}, 4<<20) // more than any socket takes
		done := h.write(ctx, p, 0)
		rq := h.request(t)
		cancel()
		if err := soon(t, done); !errors.Is(err, context.Canceled) {
			t.Fatalf("write: %v, want context.Canceled", err)
		}
		for i := range p {
			p[i] = 2
		}
		if got := h.payload(t, rq); !bytes.Equal(got, bytes.Repeat([]byte{1}, len(p))) {
			t.Error("the server got bytes that the caller wrote after WriteAtContext had returned")
		}
		h.answer(t, rq, nil)
		h.works(t)
	})
}

// TestCancelWriteQueued gives up writes that wait behind one that is on its
// way, also those for which there is no room even to wait: they are never sent.
func TestCancelWriteQueued(t *testing.T) {
	const size = 1 << 20
	eachLink(t, ClientOptions{}, func(t *testing.T, h *byHand) {
		first := h.write(t.Context(), make([]byte, 4<<20), 0)
		rq := h.request(t)
		ctx, cancel := context.WithCancel(t.Context())
		var queued []<-chan error
		for i := range int64(8) {
			queued = append(queued, h.write(ctx, make([]byte, size), 8<<20+i*size))
		}
		reads := h.read(ctx, make([]byte, size), 0)
		h.inFlight(t, 10)
		cancel()
		for _, done := range append(queued, reads) {
			if err := soon(t, done); !errors.Is(err, context.Canceled) {
				t.Errorf("queued: %v, want context.Canceled", err)
			}
		}
		h.inFlight(t, 1)
		h.payload(t, rq)
		h.answer(t, rq, nil)
		if err := soon(t, first); err != nil {
			t.Errorf("the write that was not given up: %v", err)
		}
		h.works(t) // whose request must be the next
	})
}

// TestCancelReadHalfWay gives up a read of which half has arrived.
func TestCancelReadHalfWay(t *testing.T) {
	const size = 1 << 20
	eachLink(t, ClientOptions{}, func(t *testing.T, h *byHand) {
		ctx, cancel := context.WithCancel(t.Context())
		p := make([]byte, size)
		done := h.read(ctx, p, 0)
		rq := h.request(t)
		h.answer(t, rq, bytes.Repeat([]byte{1}, size/2))
		cancel()
		if err := soon(t, done); !errors.Is(err, context.Canceled) {
			t.Fatalf("read: %v, want context.Canceled", err)
		}
		clear(p)
		if _, err := h.server.Write(bytes.Repeat([]byte{1}, size/2)); err != nil {
			t.Fatal(err)
		}
		h.works(t)
		if !bytes.Equal(p, make([]byte, size)) {
			t.Error("the buffer was written to after ReadAtContext had returned")
		}
	})
}

// TestCancelStreamHalfWay must not call the sink once it has returned.
func TestCancelStreamHalfWay(t *testing.T) {
	const size = 1 << 20
	eachLink(t, ClientOptions{}, func(t *testing.T, h *byHand) {
		ctx, cancel := context.WithCancel(t.Context())
		var over atomic.Bool
		var bytesSeen atomic.Int64
		done := start(func() error {
			defer over.Store(true)
			return h.ReadStream(ctx, 0, size, func(_, n int64, _ []byte) error {
				if over.Load() {
					t.Error("the sink was called after ReadStream had returned")
				}
				bytesSeen.Add(n)
				return nil
			})
		})
		rq := h.request(t)
		h.answer(t, rq, make([]byte, size/2))
		cancel()
		if err := soon(t, done); !errors.Is(err, context.Canceled) {
			t.Fatalf("stream: %v, want context.Canceled", err)
		}
		if _, err := h.server.Write(make([]byte, size/2)); err != nil {
			t.Fatal(err)
		}
		h.works(t)
		if n := bytesSeen.Load(); n > size/2 {
			t.Errorf("%d bytes were passed on, %d had been sent", n, size/2)
		}
	})
}

// TestCancelUnanswered gives up more requests than may be in flight, one after
// the other, with a server that does not answer: it must not get more of them,
// and the client must not remember more.
func TestCancelUnanswered(t *testing.T) {
	const limit = 3
	eachLink(t, ClientOptions{MaxInFlight: limit}, func(t *testing.T, h *byHand) {
		var sent []request
		for i := range int64(limit) {
			ctx, cancel := context.WithCancel(t.Context())
			done := h.write(ctx, make([]byte, 512), i*512)
			rq := h.request(t)
			sent = append(sent, rq)
			h.payload(t, rq)
			cancel()
			if err := soon(t, done); !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
		}
		for range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			if err := soon(t, h.write(ctx, make([]byte, 512), 1<<20)); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("beyond the limit: %v, want context.DeadlineExceeded", err)
			}
			cancel()
		}
		h.inFlight(t, limit)
		for _, rq := range sent {
			h.answer(t, rq, nil)
		}
		h.inFlight(t, 0)
		h.works(t)
	})
}

// TestCancelDown gives up requests while there is no connection: one that was
// sent before, and one that was not.
func TestCancelDown(t *testing.T) {
	p := newPeer()
	p.hand = make(chan net.Conn, 1)
	dialling := make(chan struct{}, 1)
	o := ClientOptions{Connections: 1, IOTimeout: time.Hour, HandshakeTimeout: time.Hour}
	o.Dialer = func(ctx context.Context, network, address string) (net.Conn, error) {
		if p.dials.Load() == 0 {
			return p.dial(ctx, network, address)
		}
		dialling <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c, err := Dial(t.Context(), URI{Host: "peer", Export: "x"}, o)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := &byHand{Client: c, p: p, server: <-p.hand}
	ctx, cancel := context.WithCancel(t.Context())
	before := h.write(ctx, make([]byte, 512), 0)
	h.payload(t, h.request(t))
	h.server.Close()
	<-dialling
	after := h.read(ctx, make([]byte, 512), 0)
	h.inFlight(t, 2)
	cancel()
	for _, done := range []<-chan error{before, after} {
		if err := soon(t, done); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want context.Canceled", err)
		}
	}
	h.inFlight(t, 0)
}

// TestCancelBehindBlock gives up a write that waits for another one to the same
// block.
func TestCancelBehindBlock(t *testing.T) {
	p := newPeer()
	p.blocks = &blockSizes{4096, 4096, 1 << 16}
	p.hand = make(chan net.Conn, 1)
	c, err := p.client(ClientOptions{IOTimeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := &byHand{Client: c, p: p, server: <-p.hand}
	defer h.server.Close()
	first, cancelFirst := context.WithCancel(t.Context())
	defer cancelFirst()
	one := h.write(first, []byte("one"), 1)
	h.request(t) // for the block; it is not answered
	second, cancelSecond := context.WithCancel(t.Context())
	two := h.write(second, []byte("two"), 5)
	cancelSecond()
	if err := soon(t, two); !errors.Is(err, context.Canceled) {
		t.Errorf("the second write: %v, want context.Canceled", err)
	}
	cancelFirst()
	if err := soon(t, one); !errors.Is(err, context.Canceled) {
		t.Errorf("the first write: %v, want context.Canceled", err)
	}
}

// TestCloseWhileStuck ends calls that are stuck in every way.
func TestCloseWhileStuck(t *testing.T) {
	eachLink(t, ClientOptions{}, func(t *testing.T, h *byHand) {
		calls := []<-chan error{
			h.write(t.Context(), make([]byte, 8<<20), 0),
			h.read(t.Context(), make([]byte, 8<<20), 0),
			start(h.Sync),
		}
		h.inFlight(t, 5)
		if err := soon(t, start(h.Close)); err != nil {
			t.Errorf("Close: %v", err)
		}
		for i, done := range calls {
			if err := soon(t, done); !errors.Is(err, memferry.ErrClosed) {
				t.Errorf("call %d: %v, want ErrClosed", i, err)
			}
		}
	})
}

// TestCloseEndsQueries: what asks the server over a connection of its own ends
// with the client, and with its context.
func TestCloseEndsQueries(t *testing.T) {
	p := newPeer()
	asked := make(chan struct{}, 2)
	o := ClientOptions{HandshakeTimeout: time.Hour, Connections: 1}
	o.Dialer = func(ctx context.Context, network, address string) (net.Conn, error) {
		if p.dials.Load() == 0 {
			return p.dial(ctx, network, address)
		}
		client, server := net.Pipe()
		context.AfterFunc(t.Context(), func() { server.Close() })
		asked <- struct{}{} // and says nothing
		return client, nil
	}
	c, err := Dial(t.Context(), URI{Host: "peer", Export: "x"}, o)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask := func(ctx context.Context) <-chan error {
		done := start(func() error { _, err := c.Generation(ctx); return err })
		<-asked
		return done
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := ask(ctx)
	cancel()
	if err := soon(t, done); !errors.Is(err, context.Canceled) {
		t.Errorf("Generation whose context ended: %v, want context.Canceled", err)
	}
	done = ask(t.Context())
	if err := soon(t, start(c.Close)); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := soon(t, done); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("Generation of a closed client: %v, want ErrClosed", err)
	}
}
