package chunk

import (
	"maps"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// modelDrop is a drop between its steps: 0 none, 1 begun, 2 taken.
type modelDrop struct {
	step     int
	run      Run
	kept     []Run
	recorded bool
}

// outsideDrop skips what the region doesn't do during a drop.
func (m *model) outsideDrop(t *rapid.T) {
	if m.drop.step != 0 {
		t.Skip("a drop is under way")
	}
}

func (m *model) allActions() map[string]func(*rapid.T) {
	actions := m.actions()
	maps.Copy(actions, m.dropActions())
	return actions
}

// dropActions drop pages, of which somebody else has changed the remote's
// bytes: whatever was fetched before must not be seen afterwards.
func (m *model) dropActions() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"beginDrop": func(t *rapid.T) {
			if m.drop.step != 0 || m.commit != 0 {
				t.Skip("not now")
			}
			page, n := m.span(t)
			m.drop = modelDrop{step: 1, run: Run{page, n}}
			m.t.BeginDrop(m.drop.run)
			if m.t.Claim(page, n, true) != nil {
				t.Fatal("pages that are dropped were claimed")
			}
			if busy := m.t.BeginWrite(page, 1); busy < 0 {
				t.Fatal("a write to pages that are dropped began")
			}
		},
		"takeDrop": func(t *rapid.T) {
			if m.drop.step != 1 || m.t.DropBusy() >= 0 {
				t.Skip("not now")
			}
			m.takeDrop(t)
		},
		"endDrop": func(t *rapid.T) {
			if m.drop.step != 2 {
				t.Skip("not now")
			}
			m.endDrop(t)
		},
	}
}

func (m *model) takeDrop(t *rapid.T) {
	m.drop.step = 2
	m.drop.recorded = rapid.Bool().Draw(t, "recorded")
	before := map[int64]bool{}
	for p := m.drop.run.Page; p < m.drop.run.End(); p++ {
		before[p] = m.t.Resident(p, 1)
		if st := m.t.State(p); st == StateLanding || st == StateWriting || st == StateFetching {
			t.Fatalf("page %d is %v in a drop that nothing holds up", p, st)
		}
	}
	taken := m.t.TakeDrop()
	for _, r := range taken {
		for p := r.Page; p < r.End(); p++ {
			if !before[p] || m.local[p] != m.synced[p] || m.local[p] != m.app[p] {
				t.Fatalf("page %d was dropped with %d, which the remote may lack", p, m.local[p])
			}
			delete(before, p)
			if m.drop.recorded {
				m.storeState[p] = Absent
			}
			if !m.drop.recorded || rapid.IntRange(0, 3).Draw(t, "keep") == 0 {
				m.drop.kept = append(m.drop.kept, Run{p, 1})
				continue
			}
			m.next++
			m.remote[p], m.synced[p], m.app[p] = m.next, m.next, m.next
		}
	}
	for p, resident := range before {
		if st := m.t.State(p); resident && st == StatePresent && m.t.Clean(p, 1) {
			t.Fatalf("page %d is clean, and was not dropped", p)
		}
	}
}

func (m *model) endDrop(t *rapid.T) {
	m.t.EndDrop(m.drop.kept, m.drop.recorded)
	for _, r := range m.drop.kept {
		if !m.t.Resident(r.Page, r.N) {
			t.Fatalf("%v was kept, and is absent", r)
		}
	}
	m.drop = modelDrop{}
}

// settleDrop ends a drop when nothing else is under way.
func (m *model) settleDrop(t *rapid.T) {
	if m.drop.step == 1 {
		if busy := m.t.DropBusy(); busy >= 0 {
			t.Fatalf("page %d holds up a drop at rest", busy)
		}
		m.takeDrop(t)
	}
	if m.drop.step == 2 {
		m.endDrop(t)
	}
}

// TestResidentBesideDrops: a reader without a lock never takes a page for
// present because of what happens to others.
func TestResidentBesideDrops(t *testing.T) {
	const pages = 4 * blockPages
	tb := New(pages, false)
	// Block 0 is never present; the others come and go, in turn.
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if tb.Resident(blockPages-2, 2) || tb.Resident(blockPages-1, 2) {
				t.Error("an absent page was present for a moment")
				return
			}
		}
	})
	for i := range int64(2000) {
		page := (1+i%3)*blockPages + i%wordPages
		tb.present.setRange(page, 100)
		tb.BeginDrop(Run{page, 100})
		tb.TakeDrop()
		tb.EndDrop(nil, false)
		if tb.Resident(page, 1) {
			t.Fatal("a dropped page is present")
		}
	}
	close(stop)
	wg.Wait()
	if err := tb.Check(); err != nil {
		t.Error(err)
	}
	if tb.present.spare != nil {
		t.Error("a block of a shared bitmap is kept for another use")
	}
}
