package nbd

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

// firstHeld is a backend that holds the first write until it is released, and
// then carries it out.
type firstHeld struct {
	*plain
	n       atomic.Int64
	begun   chan struct{} // closed when the first one arrives
	release chan struct{}
	over    chan struct{} // closed when it has been carried out
	let     func()        // releases it
}

func newFirstHeld() *firstHeld {
	h := &firstHeld{plain: newPlain(1 << 16), begun: make(chan struct{}), release: make(chan struct{}), over: make(chan struct{})}
	h.let = sync.OnceFunc(func() { close(h.release) })
	return h
}

// serve serves it, and releases what it holds before the server is stopped.
func (h *firstHeld) serve(t *testing.T, o ServerOptions) (*Server, URI) {
	s, path := serveWith(t, o, Export{Name: "x", Backend: h})
	t.Cleanup(h.let)
	return s, URI{Socket: path, Export: "x"}
}

func (h *firstHeld) WriteAt(p []byte, off int64) (int, error) {
	if h.n.Add(1) > 1 {
		return h.plain.WriteAt(p, off)
	}
	close(h.begun)
	<-h.release
	defer close(h.over)
	return h.plain.WriteAt(p, off)
}

// breakable is a connection whose end the client believes to see long before
// the server does, as after a loss of the network in one direction.
type breakable struct {
	net.Conn
	broken chan struct{}
	once   *sync.Once
}

func (b breakable) brk() {
	b.once.Do(func() { close(b.broken); _ = b.SetReadDeadline(time.Unix(1, 0)) })
}

func (b breakable) Close() error {
	select {
	case <-b.broken:
		return nil // and the server does not hear of it
	default:
		return b.Conn.Close()
	}
}

// breakables dials connections that can be broken one by one.
type breakables struct {
	mu    sync.Mutex
	conns []breakable
}

func (d *breakables) dial(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	b := breakable{nc, make(chan struct{}), new(sync.Once)}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns = append(d.conns, b)
	return b, nil
}

// closedByServer waits until the server has closed a connection that is broken
// for the client.
func (b breakable) closedByServer(t *testing.T) {
	raw, err := b.Conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	err = raw.Control(func(fd uintptr) {
		for end := time.Now().Add(hang); time.Now().Before(end); {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
			if n, err := unix.Poll(fds, 10); n == 1 && err == nil {
				return
			}
		}
		t.Error("the server keeps the broken connection")
	})
	if err != nil {
		t.Error(err)
	}
}

func (d *breakables) first() breakable {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conns[0]
}

func filled(b byte) []byte { return bytes.Repeat([]byte{b}, 4096) }

// TestClientFencesBrokenConnection breaks a connection with a write that the
// server is at work on. Without a fence it ends after its repetition and a
// newer write, and its bytes win.
func TestClientFencesBrokenConnection(t *testing.T) {
	b := newFirstHeld()
	var d breakables
	_, uri := b.serve(t, ServerOptions{})
	c := dialTest(t, uri, ClientOptions{Connections: 2, Dialer: d.dial})
	done := make(chan error, 1)
	go func() {
		_, err := c.WriteAt(filled(1), 0)
		done <- err
	}()
	<-b.begun
	first := d.first() // of demand requests
	first.brk()
	go func() {
		first.closedByServer(t) // that is the fence
		b.let()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt(filled(2), 0); err != nil {
		t.Fatal(err)
	}
	b.let()
	<-b.over
	if got := b.bytes(0, 4096); !bytes.Equal(got, filled(2)) {
		t.Errorf("the older write won: %d", got[0])
	}
	if s := c.Stats(); s.Resent == 0 {
		t.Error("nothing was sent again: the test shows nothing")
	}
}

// TestClientOrdersAfterGivingUp gives a write up that the server is at work
// on, and writes again.
func TestClientOrdersAfterGivingUp(t *testing.T) {
	for _, broken := range []bool{false, true} {
		b := newFirstHeld()
		var d breakables
		_, uri := b.serve(t, ServerOptions{})
		c := dialTest(t, uri, ClientOptions{Connections: 2, Dialer: d.dial})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := c.WriteAtContext(ctx, filled(1), 0)
			done <- err
		}()
		<-b.begun
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if broken {
			d.first().brk()
		} else if _, err := c.WriteAt(filled(3), 8192); err != nil {
			t.Fatalf("elsewhere: %v", err)
		}
		// Sooner or later: it is only whether the second write waits that counts.
		time.AfterFunc(20*time.Millisecond, b.let)
		if _, err := c.WriteAt(filled(2), 0); err != nil {
			t.Fatal(err)
		}
		b.let()
		<-b.over
		if got := b.bytes(0, 4096); !bytes.Equal(got, filled(2)) {
			t.Errorf("broken %t: the older write won: %d", broken, got[0])
		}
	}
}

// TestClientFence ends the session of another client.
func TestClientFence(t *testing.T) {
	b := newFirstHeld()
	s, uri := b.serve(t, ServerOptions{FenceTimeout: time.Millisecond})
	first := dialTest(t, uri, ClientOptions{Connections: 1})
	second := dialTest(t, uri, ClientOptions{})
	f := memferry.CapabilitiesOf(second).Fencer
	if f == nil {
		t.Fatal("no capability")
	}
	if a, b := first.Session(), second.Session(); a == b || len(a) > memferry.MaxSession {
		t.Errorf("sessions %q and %q", a, b)
	}
	go first.WriteAt(filled(1), 0) //nolint:errcheck // what becomes of it is not known
	<-b.begun
	before := s.Stats().Accepted
	go func() {
		// Not before the server has been asked once more.
		for s.Stats().Accepted < before+2 {
			time.Sleep(time.Millisecond)
		}
		b.let()
	}()
	if err := f.Fence(t.Context(), first.Session()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-b.over:
	default:
		t.Error("the fence is up, and a write still under way")
	}
	for _, bad := range []string{"", "short", "with spaces, though long enough to be one"} {
		if err := f.Fence(t.Context(), bad); err == nil {
			t.Errorf("fence of %q: no error", bad)
		}
	}
	if _, err := second.WriteAt(filled(2), 0); err != nil {
		t.Errorf("the fencing client itself: %v", err)
	}
}
