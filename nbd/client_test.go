package nbd

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/internal/testenv"
)

// serveOn serves exports on a fresh UNIX socket and returns its path.
func serveOn(t testing.TB, exports ...Export) string {
	t.Helper()
	_, path := serveWith(t, ServerOptions{}, exports...)
	return path
}

func serveWith(t testing.TB, o ServerOptions, exports ...Export) (*Server, string) {
	t.Helper()
	path := testenv.TempSocket(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(o)
	for _, e := range exports {
		if err := s.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s, path
}

func newMem(t testing.TB, size int64) *mem.Backend {
	t.Helper()
	m, err := mem.New(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func dialTest(t testing.TB, uri URI, o ClientOptions) *Client {
	t.Helper()
	c, err := Dial(context.Background(), uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestClientContract(t *testing.T) {
	backendtest.Run(t, func(t testing.TB) memferry.Backend {
		path := serveOn(t, Export{Name: "x", Backend: newMem(t, 1<<20+4096)})
		return dialTest(t, URI{Socket: path, Export: "x"}, ClientOptions{})
	}, backendtest.Options{Volatile: true})
}

// A backend that can do nothing beyond the contract.
func TestClientPlainBackend(t *testing.T) {
	b := newPattern(1 << 20)
	c := dialTest(t, URI{Socket: serveOn(t, Export{Name: "p", Backend: b}), Export: "p"}, ClientOptions{})
	caps := c.Capabilities()
	if caps.Trimmer != nil || caps.Extenter != nil || caps.Generationer != nil {
		t.Errorf("capabilities of a plain backend: %+v", caps)
	}
	got := make([]byte, 100_001)
	if _, err := c.ReadAt(got, 777); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, b.data[777:][:len(got)]) {
		t.Error("ReadAt returned other bytes")
	}
	if _, err := c.WriteAt([]byte("hello"), 3); err != nil {
		t.Fatal(err)
	}
	if err := c.Sync(); err != nil {
		t.Fatal(err)
	}
	if b.syncs.Load() == 0 || string(b.data[3:8]) != "hello" {
		t.Errorf("%d syncs, data %q", b.syncs.Load(), b.data[3:8])
	}
}

func TestClientStream(t *testing.T) {
	m := newMem(t, 8<<20)
	want := make([]byte, 8<<20)
	r := rand.New(rand.NewPCG(uint64(testenv.Seed(t)), 0))
	for i := 3 << 20; i < len(want); i++ {
		want[i] = byte(r.Uint32())
	}
	if _, err := m.WriteAt(want[3<<20:], 3<<20); err != nil {
		t.Fatal(err)
	}
	c := dialTest(t, URI{Socket: serveOn(t, Export{Name: "x", Backend: m}), Export: "x"}, ClientOptions{MaxRequest: 1 << 20})
	got := bytes.Repeat([]byte{0xEE}, len(want))
	holes := 0
	err := c.ReadStream(t.Context(), 0, int64(len(want)), func(off, n int64, p []byte) error {
		if p == nil {
			holes++
			clear(got[off:][:n])
			return nil
		}
		copy(got[off:][:n], p)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("streamed bytes differ")
	}
	if holes == 0 {
		t.Error("no hole came as a hole")
	}
	wrong := errors.New("enough")
	if err := c.ReadStream(t.Context(), 0, 1<<20, func(int64, int64, []byte) error { return wrong }); !errors.Is(err, wrong) {
		t.Errorf("ReadStream with a failing sink: %v", err)
	}
	if _, err := c.ReadAt(got[:10], 0); err != nil {
		t.Errorf("after a failing sink: %v", err)
	}
}

func TestClientDialErrors(t *testing.T) {
	path := serveOn(t, Export{Name: "there", Backend: newPlain(4096)}, Export{Name: "also", Backend: newPlain(4096)})
	if _, err := Dial(t.Context(), URI{Socket: path, Export: "absent"}, ClientOptions{}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "memferry ls") {
		t.Errorf("missing export: %v", err)
	}
	if _, err := Dial(t.Context(), URI{Socket: filepath.Join(t.TempDir(), "none")}, ClientOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing socket: %v", err)
	}
	l, err := net.Listen("unix", testenv.TempSocket(t))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		if nc, err := l.Accept(); err == nil {
			nc.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			nc.Close()
		}
	})
	if _, err := Dial(t.Context(), URI{Socket: l.Addr().String()}, ClientOptions{}); err == nil || !strings.Contains(err.Error(), "not an NBD server") {
		t.Errorf("no NBD server: %v", err)
	}
	wg.Wait()
	wg.Go(func() {
		if nc, err := l.Accept(); err == nil {
			nc.Read(make([]byte, 1)) // until the client gives up
			nc.Close()
		}
	})
	if _, err := Dial(t.Context(), URI{Socket: l.Addr().String()}, ClientOptions{HandshakeTimeout: 50 * time.Millisecond}); !errors.Is(err, memferry.ErrTimeout) {
		t.Errorf("silent server: %v", err)
	}
	wg.Wait()
}

func TestClientList(t *testing.T) {
	path := serveOn(t, Export{Name: "a", Description: "first", Backend: newMem(t, 4096)}, Export{Name: "b", Backend: newPlain(8192), ReadOnly: true})
	got, err := List(t.Context(), URI{Socket: path}, ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].Name != "a" || got[0].Description != "first" || got[0].Size != 4096 ||
		got[1].Size != 8192 || !got[1].Flags.Has(FlagReadOnly) {
		t.Errorf("List = %+v", got)
	}
}

func TestClientGeneration(t *testing.T) {
	m := newMem(t, 1<<16)
	c := dialTest(t, URI{Socket: serveOn(t, Export{Name: "x", Backend: m}), Export: "x"}, ClientOptions{})
	g1, err := c.Generation(t.Context())
	if err != nil || g1 == "" {
		t.Fatalf("Generation = %q, %v", g1, err)
	}
	if g1 != c.Info().Generation {
		t.Errorf("handshake said %q, later %q", c.Info().Generation, g1)
	}
	if _, err := m.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if g2, err := c.Generation(t.Context()); err != nil || g2 == g1 {
		t.Errorf("after a write: %q, %v", g2, err)
	}
}

// linked returns a client of m behind a proxy.
func linked(t *testing.T, m memferry.Backend, o ClientOptions) (*Client, *netsim.Proxy) {
	t.Helper()
	path := serveOn(t, Export{Name: "x", Backend: m})
	p, err := netsim.Listen(context.Background(), netsim.UNIX(testenv.TempSocket(t)), netsim.UNIX(path), netsim.Link{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return dialTest(t, URI{Socket: p.Addr().String(), Export: "x"}, o), p
}

// Under resets, writers and readers see no error, and nothing is lost.
func TestClientReconnects(t *testing.T) {
	const size, block = 4 << 20, 64 << 10
	c, p := linked(t, newMem(t, size), ClientOptions{})
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range int64(4) {
		wg.Go(func() { writeAndReadBack(t, c, stop, w*(size/4), block) })
	}
	for range 15 {
		time.Sleep(20 * time.Millisecond)
		p.Reset()
	}
	close(stop)
	wg.Wait()
	if c.Stats().Reconnects == 0 {
		t.Error("no connection was replaced, so nothing was tested")
	}
}

// writeAndReadBack writes blocks of its own range and streams them back until
// stop is closed.
func writeAndReadBack(t *testing.T, c *Client, stop chan struct{}, base, block int64) {
	buf, got := make([]byte, block), make([]byte, block)
	for i := byte(1); ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		off := base + int64(i%16)*block
		for j := range buf {
			buf[j] = i
		}
		if _, err := c.WriteAt(buf, off); err != nil {
			t.Errorf("WriteAt: %v", err)
			return
		}
		err := c.ReadStream(context.Background(), off, block, func(at, n int64, p []byte) error {
			if p == nil {
				p = make([]byte, n)
			}
			copy(got[at-off:], p)
			return nil
		})
		if err != nil || !bytes.Equal(got, buf) {
			t.Errorf("read back: %v, equal %t", err, bytes.Equal(got, buf))
			return
		}
	}
}

// forgetInstance makes the client treat its connections as those to a server
// that does not say whether it has restarted.
func forgetInstance(c *Client) {
	c.losses.mu.Lock()
	defer c.losses.mu.Unlock()
	c.losses.named.name = ""
	c.losses.named = nil
}

// A connection that broke loses nothing as long as the server is the same, and
// all that was not synced when it has restarted.
func TestClientSyncInstance(t *testing.T) {
	for name, restart := range map[string]bool{"the same server": false, "a server that has restarted": true} {
		t.Run(name, func(t *testing.T) {
			m := newMem(t, 1<<20)
			s, path := serveWith(t, ServerOptions{}, Export{Name: "x", Backend: m})
			c := dialTest(t, URI{Socket: path, Export: "x"}, ClientOptions{Connections: 2})
			if _, err := c.WriteAt([]byte("x"), 0); err != nil {
				t.Fatal(err)
			}
			// To be removed and added again is what a restart looks like from here.
			s.Remove("x")
			x, err := newExport(Export{Name: "x", Backend: m}, s.opt.MaxRequest)
			if err != nil {
				t.Fatal(err)
			}
			want := ErrSyncLost
			if !restart {
				x.instance, want = c.losses.named.name, nil
			}
			s.mu.Lock()
			s.exports["x"] = x
			s.mu.Unlock()
			if err := c.Sync(); !errors.Is(err, want) {
				t.Errorf("Sync: %v, want %v", err, want)
			}
			if err := c.Sync(); err != nil {
				t.Errorf("second Sync: %v", err)
			}
		})
	}
}

func TestClientSyncLost(t *testing.T) {
	c, p := linked(t, newMem(t, 1<<20), ClientOptions{Connections: 1})
	forgetInstance(c)
	if _, err := c.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	p.Reset()
	var b [1]byte
	for c.Stats().Reconnects == 0 { // a read may come before the reset
		if _, err := c.ReadAt(b[:], 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Sync(); !errors.Is(err, ErrSyncLost) {
		t.Fatalf("Sync after a lost connection: %v, want ErrSyncLost", err)
	}
	if _, err := c.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Sync(); err != nil {
		t.Fatalf("Sync after writing again: %v", err)
	}
}

// gated is a backend whose calls wait: each announces itself, then takes a
// token.
type gated struct {
	memferry.Backend
	write, sync gate
}

type gate struct{ entered, leave chan struct{} }

func newGate() gate { return gate{make(chan struct{}, 16), make(chan struct{}, 16)} }

func (g gate) pass() {
	g.entered <- struct{}{}
	<-g.leave
}

func (g *gated) WriteAt(p []byte, off int64) (int, error) {
	g.write.pass()
	return g.Backend.WriteAt(p, off)
}

func (g *gated) Sync() error {
	g.sync.pass()
	return g.Backend.Sync()
}

// reconnected resets the connections of c and waits until it has noticed.
func reconnected(t *testing.T, c *Client, p *netsim.Proxy) {
	t.Helper()
	before := c.Stats().Reconnects
	p.Reset()
	for deadline := time.Now().Add(hang); c.Stats().Reconnects == before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the reset went unnoticed")
		}
	}
}

// A flush that is repeated on a new connection succeeds, but says nothing of
// writes that the server acknowledged on the old one. Every Sync under way has
// to learn of it, not just the first.
func TestClientSyncLostDuringSync(t *testing.T) {
	g := &gated{Backend: newMem(t, 1<<20), write: newGate(), sync: newGate()}
	c, p := linked(t, g, ClientOptions{Connections: 1})
	g.write.leave <- struct{}{}
	if _, err := c.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	errs := make(chan error, 2)
	for range cap(errs) {
		go func() { errs <- c.Sync() }()
	}
	for deadline := time.Now().Add(hang); c.Stats().InFlight < cap(errs); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the flushes are not under way")
		}
	}
	<-g.sync.entered
	forgetInstance(c)
	reconnected(t, c, p)
	close(g.sync.leave)
	for range cap(errs) {
		if err := <-errs; !errors.Is(err, ErrSyncLost) {
			t.Errorf("Sync during which the connection broke: %v, want ErrSyncLost", err)
		}
	}
	if err := c.Sync(); err != nil {
		t.Errorf("Sync after the loss was reported: %v", err)
	}
}

// A write that is acknowledged after a flush is not covered by it, however
// early it was sent.
func TestClientSyncLostLateWrite(t *testing.T) {
	g := &gated{Backend: newMem(t, 1<<20), write: newGate(), sync: newGate()}
	c, p := linked(t, g, ClientOptions{Connections: 2})
	for deadline := time.Now().Add(hang); c.Stats().Connections < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the second connection does not come up")
		}
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := c.WriteAtContext(memferry.WithClass(t.Context(), memferry.ClassBackground), []byte("x"), 0)
		wrote <- err
	}()
	<-g.write.entered
	g.sync.leave <- struct{}{}
	if err := c.Sync(); err != nil {
		t.Fatalf("Sync: %v", err)
	}
	g.write.leave <- struct{}{}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	forgetInstance(c)
	reconnected(t, c, p)
	close(g.sync.leave)
	if err := c.Sync(); !errors.Is(err, ErrSyncLost) {
		t.Errorf("Sync after the connection of a write broke: %v, want ErrSyncLost", err)
	}
}

// In a longer outage a request fails in time; when the link is back it works.
func TestClientTimeout(t *testing.T) {
	c, p := linked(t, newMem(t, 1<<20), ClientOptions{IOTimeout: 300 * time.Millisecond, HandshakeTimeout: 200 * time.Millisecond})
	p.Blackhole(true)
	buf := make([]byte, 4096)
	if _, err := c.ReadAt(buf, 0); !errors.Is(err, memferry.ErrTimeout) {
		t.Fatalf("read into a black hole: %v", err)
	}
	if _, err := c.WriteAt(buf, 0); !errors.Is(err, memferry.ErrTimeout) {
		t.Fatalf("write into a black hole: %v", err)
	}
	p.Blackhole(false)
	deadline := time.Now().Add(hang)
	for {
		_, err := c.ReadAt(buf, 0)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never recovered: %v", err)
		}
	}
}

func TestClientContext(t *testing.T) {
	c, p := linked(t, newMem(t, 1<<20), ClientOptions{})
	p.Blackhole(true)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.ReadAtContext(ctx, make([]byte, 512), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ReadAtContext: %v", err)
	}
}

func TestClientCloseUnblocks(t *testing.T) {
	c, p := linked(t, newMem(t, 1<<20), ClientOptions{})
	p.Blackhole(true)
	got := make(chan error, 1)
	go func() {
		_, err := c.ReadAt(make([]byte, 512), 0)
		got <- err
	}()
	for c.Stats().InFlight == 0 {
		time.Sleep(time.Millisecond)
	}
	c.Close()
	if err := <-got; !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("pending read after Close: %v", err)
	}
	if _, err := c.WriteAt([]byte{1}, 0); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
}

func TestMissing(t *testing.T) {
	got := delivered{{Off: 150, Len: 10}, {Off: 100, Len: 20}}.missing(memferry.Extent{Off: 100, Len: 100})
	want := []memferry.Extent{{Off: 120, Len: 30}, {Off: 160, Len: 40}}
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("missing = %v, want %v", got, want)
	}
}
