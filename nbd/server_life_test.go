package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

func serve(t *testing.T, s *Server) (addr string, done chan error) {
	t.Helper()
	l, err := net.Listen("unix", testenv.TempSocket(t))
	if err != nil {
		t.Fatal(err)
	}
	verdict := make(chan error, 1)
	go func() { verdict <- s.Serve(context.Background(), l) }()
	return l.Addr().String(), verdict
}

func dial(t *testing.T, addr string) *wire {
	t.Helper()
	nc, err := net.Dial("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(hang)); err != nil {
		t.Fatal(err)
	}
	return &wire{t: t, nc: nc}
}

func TestShutdownDrains(t *testing.T) {
	b := newStuck(testSize, 0)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
	addr, done := serve(t, s)
	w, idle, early := dial(t, addr), dial(t, addr), dial(t, addr)
	w.enter("x", true)
	idle.enter("x", true)
	early.hello()
	w.send(request{typ: cmdRead, cookie: 3, length: 100})
	<-b.entered
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(testenv.Deadline(t, hang)) }()
	for _, other := range []*wire{idle, early} {
		if n, err := io.Copy(io.Discard, other.nc); n != 0 || err != nil {
			t.Errorf("idle client: %d bytes, error %v", n, err)
		}
	}
	select {
	case err := <-down:
		t.Fatalf("Shutdown did not wait: %v", err)
	default:
	}
	close(b.release)
	if a := w.receive(0); a.errno != 0 || len(a.data) != 100 {
		t.Errorf("request in flight: %+v", a)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := s.Serve(context.Background(), mustListen(t)); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("Serve after Shutdown: %v", err)
	}
}

func mustListen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", testenv.TempSocket(t))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestShutdownGivesUp(t *testing.T) {
	b := newStuck(testSize, 0)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
	addr, done := serve(t, s)
	w := dial(t, addr)
	w.enter("x", true)
	w.send(request{typ: cmdRead, length: 100})
	<-b.entered
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	close(b.release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestCloseIsPrompt(t *testing.T) {
	b := newViewed(testSize)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
	addr, done := serve(t, s)
	w := dial(t, addr)
	w.enter("x", false)
	// The client does not read, so the server waits in a write.
	for range 100 {
		w.send(request{typ: cmdRead, length: testSize})
	}
	for b.views.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(hang):
		t.Fatal("Serve does not return")
	}
	if n := b.views.Load(); n != 0 {
		t.Errorf("%d views not released", n)
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: newPlain(testSize)})
	l := mustListen(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	w := dial(t, l.Addr().String())
	w.enter("x", false)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// The server goes on with other listeners.
	v := connect(t, s)
	v.enter("x", false)
	v.disconnect()
}

func TestStats(t *testing.T) {
	s := startServer(t, ServerOptions{PollTime: -1}, Export{Name: "x", Backend: newAble(testSize)})
	w := connect(t, s)
	w.enter("x", true)
	w.ask(request{typ: cmdRead, length: 100})
	w.ask(request{typ: cmdWrite, length: 3}, 1, 2, 3)
	w.ask(request{typ: cmdFlush})
	w.ask(request{typ: cmdTrim, length: 1})
	w.ask(request{typ: cmdRead, offset: testSize, length: 1})
	want := ServerStats{Connections: 1, Accepted: 1, Reads: 2, Writes: 1, Flushes: 1, Trims: 1, ReadBytes: 100, WriteBytes: 3, Errors: 1}
	got := s.Stats()
	got.InFlight, got.Memory = 0, 0 // given back after the answer is sent
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	w.disconnect()
	want.Connections, want.Others = 0, 1
	if d := cmp.Diff(want, s.Stats()); d != "" {
		t.Errorf("after the client left (-want +got)\n%s", d)
	}
}

func TestSyncsAreShared(t *testing.T) {
	var g syncGroup
	running, release := make(chan struct{}, 10), make(chan struct{})
	g.sync = func() error { running <- struct{}{}; <-release; return EIO }
	results := make(chan error, 10)
	go func() { results <- g.do() }()
	<-running
	// These began while one was running, so they need another, and share it.
	for range 5 {
		go func() { results <- g.do() }()
	}
	for g.waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
	close(release)
	for range 6 {
		if err := <-results; !errors.Is(err, EIO) {
			t.Errorf("error %v", err)
		}
	}
	if n := len(running) + 1; n > 6 || n < 2 {
		t.Errorf("%d syncs", n)
	}
}

func (g *syncGroup) waiting() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.next == nil {
		return 0
	}
	return 1
}
