package fuse

import (
	"errors"
	"strings"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// watched tells a mount what a region would.
type watched struct {
	memferry.Backend
	before func(off, n int64) error
	after  func(off, n int64)
	stops  int
}

func (w *watched) WatchInvalidate(before func(off, n int64) error, after func(off, n int64)) func() {
	w.before, w.after = before, after
	return func() { w.stops++ }
}

func (w *watched) Capabilities() memferry.Capabilities { return memferry.CapabilitiesOf(w.Backend) }

// TestInvalidated: the kernel forgets what it has cached of a range, and only
// of that.
func TestInvalidated(t *testing.T) {
	m := newTestMemory(t, testSize)
	w := &watched{Backend: m}
	d := mountAt(t, w, t.TempDir(), Options{})
	ask := func(page string) string {
		got := run(t, "read", d.Path(), page)
		return got[strings.LastIndexByte(got, '\n')+1:]
	}
	if ask("5") != "0" || ask("9") != "0" {
		t.Fatal("not zero at first")
	}
	m.mem[5*4096], m.mem[9*4096] = 7, 7
	reads := m.reads.Load() + m.viewed.Load()
	if err := w.before(5*4096, 4096); err != nil {
		t.Fatal(err)
	}
	w.after(5*4096, 4096)
	if got := ask("5"); got != "7" {
		t.Errorf("the invalidated page: %s", got)
	}
	if m.reads.Load()+m.viewed.Load() == reads {
		t.Error("the kernel did not ask")
	}
	if got := ask("9"); got != "0" {
		t.Skipf("the kernel had no copy of the page beside it (%s)", got)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if w.stops != 1 {
		t.Errorf("stopped watching %d times", w.stops)
	}
}

// passing is a region whose file can be passed through.
type passing struct {
	*pulled
	watched
}

func (p *passing) Capabilities() memferry.Capabilities { return memferry.CapabilitiesOf(p.pulled) }
func (p *passing) Close() error                        { return p.pulled.Close() }
func (p *passing) Sync() error                         { return p.pulled.Sync() }
func (p *passing) Size() int64                         { return p.pulled.Size() }

// ReadAt and WriteAt are pulled's; watched has none of its own here.
func (p *passing) ReadAt(b []byte, off int64) (int, error)  { return p.pulled.ReadAt(b, off) }
func (p *passing) WriteAt(b []byte, off int64) (int, error) { return p.pulled.WriteAt(b, off) }

// TestInvalidatedPassthrough: what the kernel reads by itself can't be
// invalidated, and what was invalidated isn't given to it.
func TestInvalidatedPassthrough(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "fuse-passthrough")
	for _, first := range []bool{false, true} {
		p := &passing{pulled: &pulled{memory: newTestMemory(t, testSize)}}
		d := mountAt(t, p, t.TempDir(), Options{})
		p.complete.Store(true)
		// The kernel tells of the last close of the mount's own open a moment later.
		for i := 0; first && !d.Passthrough() && i < 500; i++ {
			run(t, "read", d.Path(), "1")
		}
		if d.Passthrough() != first {
			t.Fatalf("passthrough: %v", d.Passthrough())
		}
		err := p.before(0, 4096)
		if errors.Is(err, memferry.ErrInUse) != first {
			t.Errorf("passthrough %v: %v", first, err)
		}
		run(t, "read", d.Path(), "1")
		if d.Passthrough() != first {
			t.Errorf("passthrough %v became %v", first, d.Passthrough())
		}
	}
}
