package crash

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/internal/cache"
	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/nbd"
	"github.com/memferry/memferry/region"
)

const lateSize = 1 << 20

// late is a source that holds the first write until it is told to go on, as a
// slow disk does. It has a generation, as a file has.
type late struct {
	memferry.Backend
	writes atomic.Int64
	tag    atomic.Int64
	begun  chan struct{} // closed when the first write arrives
	over   chan struct{} // closed when it has been carried out
	let    func()        // lets it go on
	gate   chan struct{}
}

func newLate(t *testing.T) *late {
	m, err := mem.New(lateSize)
	if err != nil {
		t.Fatal(err)
	}
	l := &late{Backend: m, begun: make(chan struct{}), over: make(chan struct{}), gate: make(chan struct{})}
	l.let = sync.OnceFunc(func() { close(l.gate) })
	return l
}

func (l *late) WriteAt(p []byte, off int64) (int, error) {
	if l.writes.Add(1) == 1 {
		close(l.begun)
		<-l.gate
		defer close(l.over)
	}
	defer l.tag.Add(1)
	return l.Backend.WriteAt(p, off)
}

func (l *late) Generation(context.Context) (string, error) {
	return strconv.FormatInt(l.tag.Load(), 10), nil
}

// Capabilities keeps the memory's views from going around WriteAt.
func (l *late) Capabilities() memferry.Capabilities {
	return memferry.Capabilities{Generationer: l}
}

// process stands for one that uses a region, up to its end by kill -9: it then
// does nothing any more, and the server has not noticed.
type process struct {
	reg    *region.Region
	client *nbd.Client

	mu    sync.Mutex
	dead  bool
	conns []net.Conn
}

func (p *process) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if err := p.alive(); err != nil {
		return nil, err
	}
	nc, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, nc)
	return processConn{nc, p}, nil
}

// fenced waits until the server has closed a connection of the dead process.
func (p *process) fenced(ctx context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ctx.Err() == nil {
		for _, nc := range p.conns {
			if hungUp(nc) {
				return
			}
		}
		time.Sleep(time.Millisecond)
	}
}

func hungUp(nc net.Conn) (yes bool) {
	raw, err := nc.(*net.UnixConn).SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(fds, 0)
		yes = n == 1 && err == nil
	})
	return yes && err == nil
}

// bury closes what a dead process has left open.
func (p *process) bury() {
	for _, nc := range p.conns {
		_ = nc.Close()
	}
}

func (p *process) alive() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead {
		return errors.New("killed")
	}
	return nil
}

func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = true
}

type processConn struct {
	net.Conn
	p *process
}

func (c processConn) Write(b []byte) (int, error) {
	if err := c.p.alive(); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// Close leaves the connection of a dead process to the server.
func (c processConn) Close() error {
	if c.p.alive() != nil {
		return nil
	}
	return c.Conn.Close()
}

func startProcess(t *testing.T, socket, dir string) *process {
	t.Helper()
	p := new(process)
	client, err := nbd.Dial(t.Context(), nbd.URI{Socket: socket, Export: "late"},
		nbd.ClientOptions{Connections: 2, Dialer: p.dial, IOTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	c, err := cache.Open(dir, cache.Identity{URL: "late", Size: lateSize}, cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p.client = client
	p.reg, err = region.Open(t.Context(), client, c.Local(), region.Options{
		Store: c, Pull: region.PullNone, PushInterval: -1, PushIdle: -1, IOTimeout: 10 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestLateWrite kills a process while the server has a write of it under way.
// Without a fence the next one is told of another generation when that write
// ends, and takes it for somebody else's change; or it has pushed a newer
// version of the page by then, and the old one wins.
func TestLateWrite(t *testing.T) {
	source := newLate(t)
	socket := testenv.TempSocket(t)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.NewServer(nbd.ServerOptions{})
	if err := s.Add(nbd.Export{Name: "late", Backend: source}); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		source.let()
		if err := errors.Join(s.Close(), <-served); err != nil {
			t.Error(err)
		}
	})

	first, second := filepath.Join(t.TempDir(), "first"), filepath.Join(t.TempDir(), "second")
	one := startProcess(t, socket, first)
	page := func(v byte) []byte { return bytes.Repeat([]byte{v}, memferry.PageSize) }
	if _, err := one.reg.WriteAt(page(1), 0); err != nil {
		t.Fatal(err)
	}
	pushed := make(chan error, 1)
	go func() { pushed <- one.reg.Push(context.Background()) }()
	<-source.begun
	one.kill()
	if err := os.Mkdir(second, 0o700); err != nil {
		t.Fatal(err)
	}
	copyCache(t, second, first)
	t.Cleanup(func() {
		one.bury()
		// What these say is of no interest: it is dead.
		_ = errors.Join(one.client.Close(), one.reg.Close(), <-pushed)
	})

	// The fence waits for the write, so it has to go on; without a fence it
	// does so at the worst moment.
	ctx, cancel := context.WithCancel(t.Context())
	var watch sync.WaitGroup
	watch.Go(func() {
		one.fenced(ctx)
		source.let()
	})
	defer watch.Wait()
	defer cancel()
	two := startProcess(t, socket, second)
	if _, err := two.reg.WriteAt(page(2), 0); err != nil {
		t.Fatal(err)
	}
	if err := two.reg.Push(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel() // let it go on
	<-source.over
	got := make([]byte, memferry.PageSize)
	if _, err := source.ReadAt(got, 0); err != nil || !bytes.Equal(got, page(2)) {
		t.Errorf("the source has version %d (%v); 2 was pushed last", got[0], err)
	}
	if err := errors.Join(writePage(two.reg, page(3)), two.reg.Push(t.Context()), two.reg.Close()); err != nil {
		t.Error(err)
	}
}

func writePage(r *region.Region, p []byte) error {
	_, err := r.WriteAt(p, 0)
	return err
}

func copyCache(t *testing.T, to, from string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		copyFile(t, filepath.Join(to, e.Name()), filepath.Join(from, e.Name()))
	}
}
