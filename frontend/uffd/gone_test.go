package uffd

import (
	"context"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestWrittenAndGone: a page that was written to is handed over although the
// kernel has taken it out of the page tables since, and nobody touched it
// again. It leaves nothing there that says so.
func TestWrittenAndGone(t *testing.T) {
	for _, small := range []bool{true, false} {
		for name, take := range map[string]func(t *testing.T, m *Memory){
			"by the application": func(t *testing.T, m *Memory) {
				if err := unix.Madvise(m.app.data, unix.MADV_DONTNEED); err != nil {
					t.Fatal(err)
				}
			},
			// The huge page is split, and all of it unmapped for that.
			"by the removal of others": func(t *testing.T, m *Memory) {
				m.syncing.Lock() // as Invalidate, but for handing over first
				defer m.syncing.Unlock()
				if err := m.engine.invalidate(context.Background(), 1<<20, 1<<20); err != nil {
					t.Fatal(err)
				}
			},
		} {
			t.Run(name, func(t *testing.T) { testWrittenAndGone(t, small, take) })
		}
	}
}

func testWrittenAndGone(t *testing.T, small bool, take func(t *testing.T, m *Memory)) {
	want := noise(t, 4<<20)
	path := sourceFile(t, want)
	m := helped(t, "file:"+path, Options{SmallPages: small})
	defer closed(t, m)
	tracked(t, m)
	if err := m.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if b, err := m.Dirty(); err != nil || b.Count() != 0 {
		t.Fatalf("%d pages dirty before anything was written, %v", b.Count(), err)
	}
	for round := range byte(3) {
		const at = 77*pageSize + 5
		m.Bytes()[at] = round
		want[at] = round
		take(t, m)
		b, err := m.Dirty()
		if err != nil || b.Count() != 1 || !b.Has(77) {
			t.Errorf("round %d: %d pages dirty, %v; want the one that was written to", round, b.Count(), err)
		}
		if err := m.Sync(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || got[at] != round {
			t.Errorf("round %d: the source has %d, %v", round, got[at], err)
		}
		if b, err := m.Dirty(); err != nil || b.Count() != 0 {
			t.Errorf("round %d: %d pages dirty again, %v", round, b.Count(), err)
		}
		if m.Bytes()[at] != round {
			t.Errorf("round %d: the memory has %d", round, m.Bytes()[at])
		}
	}
}
