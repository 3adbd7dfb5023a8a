package nbd

import (
	"bytes"
	"context"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/testenv"
)

// longPoll is so long that a request which is on its way always comes in time.
const longPoll = 10 * time.Second

func TestPollerBacksOff(t *testing.T) {
	var p poller
	waits := func() (n int) { // until the next one that polls, itself included
		for n = 1; !p.due(); n++ {
			if n > 2*maxPollSkips {
				t.Fatal("never polls again")
			}
		}
		return n
	}
	for i := range 20 {
		want := 1
		if i > 0 {
			want = min(1<<(i-1), maxPollSkips) + 1
		}
		if n := waits(); n != want {
			t.Errorf("after %d misses: polls at wait %d, want %d", i, n, want)
		}
		p.polled(false)
	}
	waits()
	p.polled(true)
	if n := waits(); n != 1 {
		t.Errorf("after a hit: polls at wait %d", n)
	}
}

// polls returns a client of a server that polls for d.
func polls(t *testing.T, d time.Duration) (*Server, *wire) {
	t.Helper()
	if runtime.GOMAXPROCS(0) == 1 {
		t.Skip("needs two processors: with one, nothing polls")
	}
	s := startServer(t, ServerOptions{PollTime: d}, Export{Name: "d", Backend: newViewed(1 << 16)})
	w := connect(t, s)
	w.enter("d", false)
	return s, w
}

// readAt reads from what polls serves, and checks it.
func (w *wire) readAt(off uint64, n uint32) {
	w.t.Helper()
	a := w.ask(request{typ: cmdRead, offset: off, length: n})
	w.checkPattern(a, off, n)
}

func (w *wire) checkPattern(a answer, off uint64, n uint32) {
	w.t.Helper()
	if a.errno != 0 || !bytes.Equal(a.data, newPattern(1<<16).bytes(int(off), int(n))) {
		w.t.Errorf("read at %d: errno %v, or wrong bytes", off, a.errno)
	}
}

// TestPoll: requests that come while they are polled for are served, also when
// they come in pieces, and counted.
func TestPoll(t *testing.T) {
	s, w := polls(t, longPoll)
	for i := range uint64(100) {
		rq := appendRequest(nil, request{typ: cmdRead, cookie: i, offset: i * 512, length: 512})
		for cut := int(i % requestLen); len(rq) > 0; cut = len(rq) {
			w.write(rq[:cut])
			rq = rq[cut:]
			runtime.Gosched()
		}
		w.checkPattern(w.receive(512), i*512, 512)
	}
	w.disconnect()
	if n := s.Stats().Polled; n < 50 {
		t.Errorf("%d of 100 requests were polled for", n)
	}
}

// TestPollOff: a negative time means never.
func TestPollOff(t *testing.T) {
	s, w := polls(t, -1)
	for i := range uint64(100) {
		w.readAt(i*512, 512)
	}
	if n := s.Stats().Polled; n != 0 {
		t.Errorf("%d requests were polled for", n)
	}
}

// TestPollOneAtATime: while one connection polls, others sleep, and are served.
func TestPollOneAtATime(t *testing.T) {
	s, w := polls(t, longPoll)
	w.readAt(0, 512)
	waitFor(t, s.polling.Load)
	before := s.Stats().Polled
	other := connect(t, s)
	other.enter("d", false)
	for i := range uint64(100) {
		other.readAt(i*512, 512)
	}
	if n := s.Stats().Polled - before; n != 0 {
		t.Errorf("the other connection polled %d times", n)
	}
}

// TestPollEnds: whoever polls notices the ends that sleepers notice.
func TestPollEnds(t *testing.T) {
	for name, end := range map[string]func(s *Server, w *wire) error{
		"client leaves": func(_ *Server, w *wire) error { return w.nc.Close() },
		"shutdown":      func(s *Server, _ *wire) error { return s.Shutdown(context.Background()) },
		"close":         func(s *Server, _ *wire) error { return s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			s, w := polls(t, time.Hour)
			w.readAt(0, 512)
			waitFor(t, s.polling.Load)
			if err := end(s, w); err != nil {
				t.Fatal(err)
			}
			select {
			case <-w.done:
			case <-time.After(hang):
				t.Fatal("the connection goes on")
			}
			if s.polling.Load() {
				t.Error("still polling")
			}
		})
	}
}

// TestPollIdle: a client that says nothing costs no processor time.
func TestPollIdle(t *testing.T) {
	_, w := polls(t, DefaultPollTime)
	w.readAt(0, 512)
	const idle = 300 * time.Millisecond
	before := processTime(t)
	time.Sleep(idle)
	if used := processTime(t) - before; used > idle/2 {
		t.Errorf("%v of processor time in %v", used, idle)
	}
}

// processTime returns the processor time that this process has used.
func processTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func waitFor(t *testing.T, f func() bool) {
	t.Helper()
	ctx := testenv.Deadline(t, hang)
	for !f() {
		if ctx.Err() != nil {
			t.Fatal("it never happened")
		}
		time.Sleep(time.Millisecond)
	}
}
