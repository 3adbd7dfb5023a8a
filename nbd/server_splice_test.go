package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/file"
	"github.com/memferry/memferry/backend/mem"
)

// splicedSize is that of the backends here: more than a pipe holds.
const splicedSize = 4 << 20

// pages are the backends whose pages go to sockets by reference.
func pages(t *testing.T) map[string]memferry.Backend {
	m, err := mem.New(splicedSize)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]memferry.Backend{"memory": m, "file on a disk": newFile(t, t.TempDir())}
	if dir, err := os.MkdirTemp("/dev/shm", "memferry"); err == nil {
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		all["file in memory"] = newFile(t, dir)
	}
	for name, b := range all {
		t.Cleanup(func() {
			if err := b.Close(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		if _, err := b.WriteAt(newPattern(splicedSize).data, 0); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func newFile(t *testing.T, dir string) *file.Backend {
	t.Helper()
	b, err := file.Open(filepath.Join(dir, "data"), file.Options{Size: splicedSize})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// networks are the ways to a server, and whether pages are passed on there.
var networks = map[string]struct {
	dial    func(*testing.T, *Server) *wire
	splices bool
}{
	"unix": {func(t *testing.T, s *Server) *wire { return connect(t, s) }, true},
	"tcp":  {func(t *testing.T, s *Server) *wire { return connectOver(t, s, "tcp", "127.0.0.1:0") }, false},
}

func TestReadByReference(t *testing.T) {
	want := newPattern(splicedSize).data
	for name, b := range pages(t) {
		for network, n := range networks {
			for _, structured := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s %s structured=%t", name, network, structured), func(t *testing.T) {
					s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
					w := n.dial(t, s)
					w.enter("x", structured)
					for _, r := range []struct{ off, n int }{
						{0, spliceMin - 1},
						{0, spliceMin},
						{1, spliceMin},
						{4095, spliceMin + 4098},
						{8192, 256 << 10},
						{3, pipeSize - 3*4096},
						{0, pipeSize},
						{7, pipeSize + 5},
						{0, splicedSize},
						{splicedSize - spliceMin, spliceMin},
					} {
						a := w.ask(request{typ: cmdRead, offset: uint64(r.off), length: uint32(r.n)})
						if a.errno != 0 || !bytes.Equal(a.data, want[r.off:r.off+r.n]) {
							t.Errorf("read %+v: error %d, %d bytes, the right ones: %t", r, a.errno, len(a.data), bytes.Equal(a.data, want[r.off:r.off+r.n]))
						}
					}
					w.disconnect()
					checkSpliced(t, s, n.splices, 5*spliceMin)
				})
			}
		}
	}
}

// checkSpliced requires that a server whose clients have left sent at least
// least bytes by reference, or none, and holds nothing.
func checkSpliced(t *testing.T, s *Server, splices bool, least int64) {
	t.Helper()
	st := s.Stats()
	if splices && st.Spliced < least || !splices && st.Spliced != 0 {
		t.Errorf("%d bytes by reference; want %d or more: %t", st.Spliced, least, splices)
	}
	if st.Spliced > st.ReadBytes || st.Memory != 0 || st.InFlight != 0 {
		t.Errorf("stats %+v", st)
	}
	s.pipes.mu.Lock()
	defer s.pipes.mu.Unlock()
	if s.pipes.inUse != 0 {
		t.Errorf("%d pipes in use", s.pipes.inUse)
	}
}

// TestMixedReads has large and small reads, writes and flushes in flight at
// once, whose replies must not get into each other.
func TestMixedReads(t *testing.T) {
	want := newPattern(splicedSize).data
	for name, b := range pages(t) {
		for network, n := range networks {
			t.Run(name+" "+network, func(t *testing.T) {
				s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
				w := n.dial(t, s)
				w.enter("x", true)
				const rounds = 400
				rng := rand.New(rand.NewPCG(1, 2))
				asked := make([]request, rounds)
				for i := range asked {
					asked[i] = randomRequest(rng, uint64(i))
				}
				sent := make(chan error, 1)
				go func() {
					for _, rq := range asked {
						b := appendRequest(nil, rq)
						if rq.typ == cmdWrite { // what is there already
							b = append(b, want[rq.offset:rq.offset+uint64(rq.length)]...)
						}
						if _, err := w.nc.Write(b); err != nil {
							sent <- err
							return
						}
					}
					sent <- nil
				}()
				for range asked {
					a := w.receive(0)
					rq := asked[a.cookie]
					if a.errno != 0 {
						t.Fatalf("%+v: error %d", rq, a.errno)
					}
					if rq.typ == cmdRead && !bytes.Equal(a.data, want[rq.offset:rq.offset+uint64(rq.length)]) {
						t.Fatalf("%+v: wrong bytes", rq)
					}
				}
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				w.disconnect()
				checkSpliced(t, s, n.splices, 1<<20)
			})
		}
	}
}

func randomRequest(rng *rand.Rand, cookie uint64) request {
	rq := request{cookie: cookie, typ: cmdRead, length: uint32(1 + rng.IntN(8192))}
	switch rng.IntN(4) {
	case 0, 1:
		rq.length = uint32(spliceMin + rng.IntN(256<<10))
	case 2:
		if rng.IntN(2) == 0 {
			rq.typ = cmdWrite
		}
	default:
		if rng.IntN(4) == 0 {
			return request{cookie: cookie, typ: cmdFlush}
		}
	}
	rq.offset = uint64(rng.IntN(splicedSize - int(rq.length)))
	return rq
}

// TestShrunkFile: what is not there is an error before any data, and the
// connection goes on.
func TestShrunkFile(t *testing.T) {
	for name, b := range pages(t) {
		f, ok := b.(*file.Backend)
		if !ok {
			continue
		}
		t.Run(name, func(t *testing.T) {
			s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
			w := connect(t, s)
			w.enter("x", true)
			if err := os.Truncate(f.File().Name(), splicedSize/2); err != nil {
				t.Fatal(err)
			}
			for range 2 * maxPipes {
				a := w.ask(request{typ: cmdRead, offset: splicedSize/2 - 4096, length: spliceMin})
				if a.errno == 0 || len(a.data) != 0 {
					t.Fatalf("error %d, %d bytes", a.errno, len(a.data))
				}
			}
			if a := w.ask(request{typ: cmdRead, length: spliceMin}); a.errno != 0 || len(a.data) != spliceMin {
				t.Errorf("a read of what is there: error %d, %d bytes", a.errno, len(a.data))
			}
			w.disconnect()
			checkSpliced(t, s, true, spliceMin)
		})
	}
}

// TestStalledReadersTakeNoPipesFromOthers: clients that never read hold all
// pipes until they are cut, and others are served meanwhile.
func TestStalledReadersTakeNoPipesFromOthers(t *testing.T) {
	for name, b := range pages(t) {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, ServerOptions{WriteTimeout: time.Second}, Export{Name: "x", Backend: b})
			var stalled []*wire
			for range maxPipes + 2 {
				w := connect(t, s)
				w.enter("x", true)
				for range 8 {
					w.send(request{typ: cmdRead, length: 512 << 10})
				}
				stalled = append(stalled, w)
			}
			w := connect(t, s)
			w.enter("x", true)
			for range 4 {
				if a := w.ask(request{typ: cmdRead, length: 256 << 10}); a.errno != 0 || len(a.data) != 256<<10 {
					t.Errorf("error %d, %d bytes", a.errno, len(a.data))
				}
			}
			w.disconnect()
			for _, w := range stalled {
				select {
				case err := <-w.done:
					if err == nil {
						t.Error("a stalled client left in good order")
					}
				case <-time.After(hang):
					t.Fatal("a stalled client is kept")
				}
				_ = w.nc.Close()
			}
			checkSpliced(t, s, true, 0)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if p := s.pipes.get(1); p != nil || s.pipes.idle != nil {
				t.Errorf("after Close there are pipes: %v, %v", p, s.pipes.idle)
			}
		})
	}
}

// TestSpliceUnsupported: where a file's pages can't be had, its data is copied.
func TestSpliceUnsupported(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: pages(t)["memory"]})
	s.find("x").noSplice.Store(true)
	w := connect(t, s)
	w.enter("x", true)
	if a := w.ask(request{typ: cmdRead, length: spliceMin}); a.errno != 0 || len(a.data) != spliceMin {
		t.Errorf("error %d, %d bytes", a.errno, len(a.data))
	}
	w.disconnect()
	if n := s.Stats().Spliced; n != 0 {
		t.Errorf("%d bytes by reference", n)
	}
}

// TestPipeCopies: a socket that takes no pages gets copies.
func TestPipeCopies(t *testing.T) {
	p, err := newPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	want := newPattern(40 << 10).data
	if err := errors.Join(p.putHeader(want[:10]), p.putMemory(want[10:])); err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	defer a.Close()
	got := make([]byte, len(want))
	read := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(b, got)
		read <- err
	}()
	if err := errors.Join(p.copyTo(a, len(want)), <-read); err != nil || !bytes.Equal(got, want) {
		t.Errorf("error %v, the right bytes: %t", err, bytes.Equal(got, want))
	}
}
