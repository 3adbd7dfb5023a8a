package mem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func open(t *testing.T, n int64) *Backend {
	t.Helper()
	b, err := New(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func TestNewErrors(t *testing.T) {
	for _, n := range []int64{-1, memferry.MaxSize + 1, 1 << 60} {
		if b, err := New(n); err == nil {
			t.Errorf("New(%d): no error", n)
			_ = b.Close()
		}
	}
}

// rss returns the anonymous memory of this process and its page tables.
func rss(t *testing.T) int64 {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	var total int64
	for line := range strings.Lines(string(raw)) {
		var n int64
		for _, field := range []string{"RssAnon:", "VmPTE:"} {
			if rest, ok := strings.CutPrefix(line, field); ok {
				if _, err := fmt.Sscan(rest, &n); err != nil {
					t.Fatal(err)
				}
				total += n << 10
			}
		}
	}
	return total
}

// Size costs nothing: neither opening, reading, asking for extents nor trimming
// takes memory, and a written page does until it is trimmed.
func TestSparse(t *testing.T) {
	const size, written, slack = 4 << 40, 64 << 20, 24 << 20
	before := rss(t)
	b := open(t, size)
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += size / 4096 {
		if _, err := b.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Trim(0, size); err != nil {
		t.Fatal(err)
	}
	e, err := b.Extents(t.Context(), 0, size)
	if err != nil {
		t.Fatal(err)
	}
	if want := []memferry.Extent{{Len: size, Flags: memferry.ExtentHole | memferry.ExtentZero}}; !cmp.Equal(e, want) {
		t.Errorf("extents %v, want %v", e, want)
	}
	// The bitmap of 4 TiB is 128 MiB, which a scan maps to the zero page.
	if grown := rss(t) - before; grown > slack {
		t.Errorf("reading holes took %d bytes", grown)
	}
	for off := int64(0); off < written; off += int64(len(p)) {
		if _, err := b.WriteAt(p, size/2+off); err != nil {
			t.Fatal(err)
		}
	}
	if grown := rss(t) - before; grown < written/2 { // what ran before may have been given back meanwhile
		t.Errorf("writing %d bytes took %d: the measure is wrong", written, grown)
	}
	if err := b.Trim(size/2-5, written+10); err != nil {
		t.Fatal(err)
	}
	if grown := rss(t) - before; grown > slack {
		t.Errorf("%d bytes are left after a trim", grown)
	}
}

// Sequential writes may use huge pages; scattered ones, of any length, must not.
func TestScatteredWritesStaySparse(t *testing.T) {
	b := open(t, 8<<30)
	before := rss(t)
	p := make([]byte, 128<<10)
	const writes = 200
	for i := range int64(writes) {
		if _, err := b.WriteAt(p, (3+7*i)*hugeSize); err != nil {
			t.Fatal(err)
		}
	}
	if grown, want := rss(t)-before, int64(writes*len(p)); grown > 2*want {
		t.Errorf("%d bytes written here and there take %d", want, grown)
	}
	for i := range b.huge.units {
		if b.huge.isAdvised(i) {
			t.Fatalf("huge page %d advised", i)
		}
	}
	for off := int64(0); off < 8*hugeSize; off += int64(len(p)) {
		if _, err := b.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	// 3 was in use already, with small pages.
	for _, i := range []int64{0, 1, 2, 4, 7} {
		if !b.huge.isAdvised(i) {
			t.Errorf("huge page %d of a sequential write not advised", i)
		}
	}
	if got := b.huge.islands.Load(); got != 2 {
		t.Errorf("%d islands, want 2", got)
	}
}

func TestExtents(t *testing.T) {
	b := open(t, 100*memferry.PageSize-7)
	page := b.page
	for _, off := range []int64{page, 2 * page, 70*page + 5, b.size - 1} {
		if _, err := b.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
	}
	const hole = memferry.ExtentHole | memferry.ExtentZero
	want := []memferry.Extent{
		{Off: 3, Len: page - 3, Flags: hole},
		{Off: page, Len: 2 * page},
		{Off: 3 * page, Len: 67 * page, Flags: hole},
		{Off: 70 * page, Len: page},
		{Off: 71 * page, Len: 28 * page, Flags: hole},
		{Off: 99 * page, Len: page - 7},
	}
	if page != memferry.PageSize {
		t.Skipf("written for pages of %d bytes", memferry.PageSize)
	}
	got, err := b.Extents(t.Context(), 3, b.size-3)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func TestExtentsLimit(t *testing.T) {
	b := open(t, 3*memferry.MaxExtents*memferry.PageSize)
	for off := int64(0); off < b.size; off += 2 * b.page {
		if _, err := b.WriteAt([]byte{1}, off); err != nil {
			t.Fatal(err)
		}
	}
	got, err := b.Extents(t.Context(), 0, b.size)
	if err != nil || len(got) != memferry.MaxExtents {
		t.Errorf("%d extents, %v; want %d", len(got), err, memferry.MaxExtents)
	}
}

// A page that was trimmed while it was written must not come back to light with
// a later write beside it.
func TestTrimAgainstWrites(t *testing.T) {
	b := open(t, 64*memferry.PageSize)
	page := int(b.page)
	one := bytes.Repeat([]byte{1}, page)
	for round := range 300 {
		var wg sync.WaitGroup
		wg.Go(func() { _ = b.Trim(0, b.size) })
		for range 2 {
			wg.Go(func() {
				off := rand.Int64N(int64(len(b.data)/page)) * int64(page)
				if round%2 == 0 {
					_, _ = b.WriteAt(one, off)
					return
				}
				v, err := b.ViewForWrite(off, int64(page))
				if err != nil {
					t.Error(err)
					return
				}
				copy(v, one)
				b.ReleaseView()
			})
		}
		wg.Wait()
		before, after := make([]byte, b.size), make([]byte, b.size)
		_, _ = b.ReadAt(before, 0)
		for off := 0; off < len(before); off += page {
			before[off] = 2
			_, _ = b.WriteAt([]byte{2}, int64(off))
		}
		_, _ = b.ReadAt(after, 0)
		if !bytes.Equal(before, after) {
			t.Fatalf("round %d: a write changed its neighbours", round)
		}
		_ = b.Trim(0, b.size)
	}
}

func TestViews(t *testing.T) {
	b := open(t, 10*memferry.PageSize)
	before, _ := b.Generation(t.Context())
	w, err := b.ViewForWrite(memferry.PageSize-2, 4)
	if err != nil {
		t.Fatal(err)
	}
	during, _ := b.Generation(t.Context())
	copy(w, "view")
	b.ReleaseView()
	after, _ := b.Generation(t.Context())
	if before == during || during == after {
		t.Errorf("generation: before %s, during %s, after %s a view for writing", before, during, after)
	}
	r, err := b.View(memferry.PageSize-2, 4)
	if err != nil || string(r) != "view" || cap(r) != 4 {
		t.Errorf("View: %q, capacity %d, %v", r, cap(r), err)
	}
	if got, _ := b.Generation(t.Context()); got != after {
		t.Error("a view for reading changed the generation")
	}
	if b.views.Load() != 1 {
		t.Errorf("views %#x, want 1", b.views.Load())
	}
	b.ReleaseView()
	for _, off := range []int64{-1, b.size - 3} {
		if _, err := b.View(off, 4); !errors.Is(err, memferry.ErrOutOfRange) {
			t.Errorf("View at %d: %v", off, err)
		}
		if _, err := b.ViewForWrite(off, 4); !errors.Is(err, memferry.ErrOutOfRange) {
			t.Errorf("ViewForWrite at %d: %v", off, err)
		}
	}
}

func TestCloseWaitsForViews(t *testing.T) {
	b := open(t, memferry.PageSize)
	v, err := b.View(0, 1)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_ = b.Close()
		close(done)
	}()
	for !b.gate.Closed() {
		time.Sleep(time.Millisecond)
	}
	select {
	case <-done:
		t.Fatal("Close returned while there was a view")
	case <-time.After(10 * time.Millisecond):
	}
	if v[0] != 0 { // would fault if it were unmapped
		t.Error("not zero")
	}
	b.ReleaseView()
	<-done
}

func TestFastZero(t *testing.T) {
	b := open(t, memferry.PageSize)
	_, _ = b.WriteAt([]byte{1}, 0)
	err := b.WriteZeroes(0, b.size, memferry.ZeroFast|memferry.ZeroNoHole)
	if !errors.Is(err, memferry.ErrNotSupported) {
		t.Errorf("fast, no hole: %v", err)
	}
	var p [1]byte
	if _, _ = b.ReadAt(p[:], 0); p[0] != 1 {
		t.Error("a refused call wrote")
	}
	if err := b.WriteZeroes(0, b.size, memferry.ZeroNoHole); err != nil {
		t.Error(err)
	}
	e, err := b.Extents(context.Background(), 0, b.size)
	if err != nil || len(e) != 1 || e[0].Flags != 0 {
		t.Errorf("extents %v, %v after ZeroNoHole", e, err)
	}
}

func benchmark(b *testing.B, n int, f func(m *Backend, p []byte, off int64)) {
	const size = 256 << 20
	m, err := New(size)
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	p := bytes.Repeat([]byte{1}, n)
	for off := int64(0); off < size; off += 1 << 20 {
		_, _ = m.WriteAt(make([]byte, 1<<20), off)
	}
	b.SetBytes(int64(n))
	b.ReportAllocs()
	off := int64(0)
	for b.Loop() {
		f(m, p, off)
		off = (off + int64(n)) % size
	}
}

func BenchmarkRead4K(b *testing.B) {
	benchmark(b, 4<<10, func(m *Backend, p []byte, off int64) { _, _ = m.ReadAt(p, off) })
}

func BenchmarkRead256K(b *testing.B) {
	benchmark(b, 256<<10, func(m *Backend, p []byte, off int64) { _, _ = m.ReadAt(p, off) })
}

func BenchmarkWrite4K(b *testing.B) {
	benchmark(b, 4<<10, func(m *Backend, p []byte, off int64) { _, _ = m.WriteAt(p, off) })
}

func BenchmarkWrite256K(b *testing.B) {
	benchmark(b, 256<<10, func(m *Backend, p []byte, off int64) { _, _ = m.WriteAt(p, off) })
}

func BenchmarkFirstWrite256K(b *testing.B) {
	benchmark(b, 256<<10, func(m *Backend, p []byte, off int64) {
		if off == 0 {
			_ = m.Trim(0, m.size)
		}
		_, _ = m.WriteAt(p, off)
	})
}

func BenchmarkView(b *testing.B) {
	benchmark(b, 256<<10, func(m *Backend, _ []byte, off int64) {
		_, _ = m.View(off, 256<<10)
		m.ReleaseView()
	})
}
