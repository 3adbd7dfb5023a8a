package nbd

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
)

func writeCall() *call         { return &call{req: request{typ: cmdWrite}} }
func (l *losses) flush() *call { return &call{req: request{typ: cmdFlush}, mark: l.mark()} }

// TestLosses: when a Sync has to fail, and that it does so once.
func TestLosses(t *testing.T) {
	for name, steps := range map[string]func(l *losses) (want []bool){
		"nothing written": func(l *losses) []bool {
			l.enter("a")
			l.enter("b")
			return []bool{false}
		},
		"the same instance": func(l *losses) []bool {
			a := l.enter("a")
			l.answered(a, writeCall())
			l.broke(a)
			l.enter("a")
			return []bool{false}
		},
		"another instance": func(l *losses) []bool {
			l.answered(l.enter("a"), writeCall())
			l.enter("b")
			return []bool{true, false}
		},
		"flushed in time": func(l *losses) []bool {
			a := l.enter("a")
			l.answered(a, writeCall())
			l.answered(a, l.flush())
			l.enter("b")
			return []bool{false}
		},
		"acknowledged while a flush was under way": func(l *losses) []bool {
			a := l.enter("a")
			f := l.flush()
			l.answered(a, writeCall())
			l.answered(a, f)
			l.enter("b")
			return []bool{true, false}
		},
		"flushed by another instance": func(l *losses) []bool {
			l.answered(l.enter("a"), writeCall())
			b := l.enter("b")
			l.answered(b, l.flush())
			return []bool{true, false}
		},
		"a late break after new writes": func(l *losses) []bool {
			a := l.enter("a")
			l.answered(a, writeCall())
			b := l.enter("b")
			first := l.report(l.begin())
			l.answered(b, writeCall())
			l.broke(a) // another connection to the old one
			return []bool{!first, false}
		},
		"a late answer": func(l *losses) []bool {
			a := l.enter("a")
			l.enter("b")
			l.answered(a, writeCall())
			return []bool{true, false}
		},
		"no name": func(l *losses) []bool {
			x := l.enter("")
			l.answered(x, writeCall())
			l.broke(x)
			return []bool{true, false}
		},
		"no name, two connections, the second late": func(l *losses) []bool {
			x, y := l.enter(""), l.enter("")
			l.answered(x, writeCall())
			l.answered(y, writeCall())
			l.broke(x)
			first := l.report(l.begin())
			l.answered(l.enter(""), writeCall())
			l.broke(y)
			return []bool{!first, false}
		},
		"no name, a connection that had nothing": func(l *losses) []bool {
			x, y := l.enter(""), l.enter("")
			l.answered(x, writeCall())
			l.broke(y)
			return []bool{false}
		},
		"no name, the other connection's flush": func(l *losses) []bool {
			x, y := l.enter(""), l.enter("")
			l.answered(x, writeCall())
			l.answered(y, l.flush())
			if open := l.open([]*instance{x, y}); !slices.Equal(open, []*instance{x}) {
				return nil
			}
			l.broke(x)
			return []bool{true, false}
		},
		"a name after none": func(l *losses) []bool {
			x := l.enter("")
			l.answered(x, writeCall())
			l.broke(x)
			l.enter("a")
			return []bool{true, false}
		},
		"none after a name": func(l *losses) []bool {
			l.answered(l.enter("a"), writeCall())
			l.enter("")
			return []bool{true, false}
		},
		"two losses, one report": func(l *losses) []bool {
			l.answered(l.enter("a"), writeCall())
			l.answered(l.enter("b"), writeCall())
			l.enter("c")
			return []bool{true, false}
		},
	} {
		t.Run(name, func(t *testing.T) {
			var l losses
			want := steps(&l)
			if len(want) == 0 {
				t.Fatal("what has to be flushed is something else")
			}
			for i, w := range want {
				if got := l.report(l.begin()); got != w {
					t.Errorf("Sync %d fails: %t, want %t", i+1, got, w)
				}
			}
		})
	}
}

// Every Sync that was under way when a loss happened has to fail.
func TestLossesConcurrentSyncs(t *testing.T) {
	var l losses
	l.answered(l.enter("a"), writeCall())
	one, two := l.begin(), l.begin()
	l.enter("b")
	if !l.report(one) || !l.report(two) {
		t.Error("one of two Syncs under way was not told")
	}
	if l.report(l.begin()) {
		t.Error("a later one was told again")
	}
}

// lateConn is a connection whose end its client notices when it is told to.
type lateConn struct {
	net.Conn
	notice, closed chan struct{}
	once           *sync.Once
}

func (l lateConn) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	if err != nil && !isTimeout(err) {
		select {
		case <-l.notice:
		case <-l.closed:
		}
	}
	return n, err
}

func (l lateConn) Write(p []byte) (int, error) {
	n, err := l.Conn.Write(p)
	if err != nil && !isTimeout(err) {
		return len(p), nil // into the void
	}
	return n, err
}

func (l lateConn) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Conn.Close()
}

// lateDialer makes every second connection a late one.
type lateDialer struct {
	mu   sync.Mutex
	n    int
	late []lateConn
}

func (d *lateDialer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.n++; d.n%2 == 0 {
		return nc, nil
	}
	l := lateConn{nc, make(chan struct{}), make(chan struct{}), new(sync.Once)}
	d.late = append(d.late, l)
	return l, nil
}

// notice lets the client see the ends of all connections so far.
func (d *lateDialer) notice() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.late {
		close(l.notice)
	}
	d.late = nil
}

// TestSyncLostOncePerRestart kills a server and starts it again, many times,
// under a client with several connections, some of which notice it only after
// the next writes.
func TestSyncLostOncePerRestart(t *testing.T) {
	const rounds, connections = 20, 4
	m := newMem(t, 1<<20)
	path := testenv.TempSocket(t)
	run := func() (stop func()) {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		s := NewServer(ServerOptions{})
		if err := s.Add(Export{Name: "x", Backend: m}); err != nil {
			t.Fatal(err)
		}
		done := start(func() error { return s.Serve(context.Background(), l) })
		return func() {
			s.Close()
			if err := soon(t, done); err != nil {
				t.Errorf("Serve: %v", err)
			}
		}
	}
	stop := run()
	defer func() { stop() }()
	var d lateDialer
	c := dialTest(t, URI{Socket: path, Export: "x"}, ClientOptions{Connections: connections, Dialer: d.dial, IOTimeout: hang})
	defer d.notice()
	up := func(n int) {
		t.Helper()
		for end := time.Now().Add(hang); c.Stats().Connections < n; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d connections are up, want %d", c.Stats().Connections, n)
			}
		}
	}
	write := func() {
		t.Helper()
		var calls []<-chan error
		for i := range int64(8) {
			calls = append(calls, start(func() error { _, err := c.WriteAt(filled(1), i<<12); return err }))
		}
		for _, done := range calls {
			if err := soon(t, done); err != nil {
				t.Fatalf("write: %v", err)
			}
		}
	}
	for round := range rounds {
		up(connections)
		write()
		before := c.losses.current()
		stop()
		stop = run()
		// Every second time nobody but the late ones is asked for a while.
		for end := time.Now().Add(hang); c.losses.current() == before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the restart goes unnoticed")
			}
			if round%2 == 0 {
				d.notice()
			}
		}
		if err := c.Sync(); !errors.Is(err, ErrSyncLost) {
			t.Fatalf("round %d: the first Sync after a restart: %v, want ErrSyncLost", round, err)
		}
		d.notice()
		write()
		up(connections)
		for i := range 3 {
			if err := c.Sync(); err != nil {
				t.Fatalf("round %d: Sync %d after writing again: %v", round, i+2, err)
			}
		}
	}
}

// current returns the name of the instance that is connected to.
func (l *losses) current() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.named == nil {
		return ""
	}
	return l.named.name
}
