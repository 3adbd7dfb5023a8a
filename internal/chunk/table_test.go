package chunk

import (
	"fmt"
	"slices"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// model is the table as one would write it without a thought for speed, and
// with the bytes that it speaks of: each page's content is a number.
type model struct {
	t      *Table
	pages  int64
	remote []int // what the remote has accepted
	synced []int // what it keeps after a lost Sync
	local  []int // -1: never written
	app    []int // what an application must read
	disk   []int // local as of its last Sync
	next   int

	inWrite bool // TestInterleavings: between two steps of the write

	storeState []PageState // what a Load would find

	fetches []*modelFetch
	landing []modelRun
	zeroing []Run
	writes  []modelWrite
	pushes  []modelPush

	drop    modelDrop
	commit  int // 0 none, 1 begun, 2 decided
	changes []Change
}

type modelFetch struct {
	f    *Fetch
	data []int // the remote's content when it answered
	got  []bool
}

type modelRun struct {
	r    Run
	data []int
}

type modelWrite struct {
	page, n int64
	value   int
}

type modelPush struct {
	r    Run
	data []int
}

func newModel(pages int64) *model {
	m := &model{t: New(pages, true), pages: pages}
	for range pages {
		m.next++
		m.remote = append(m.remote, m.next)
		m.local = append(m.local, -1)
	}
	m.synced = slices.Clone(m.remote)
	m.app = slices.Clone(m.remote)
	m.storeState = make([]PageState, pages)
	return m
}

// check compares everything that can be observed.
func (m *model) check(fail func(string, ...any)) {
	if err := m.t.Check(); err != nil {
		fail("%v", err)
	}
	for p := range m.pages {
		st := m.t.State(p)
		writing := slices.ContainsFunc(m.writes, func(w modelWrite) bool { return p >= w.page && p < w.page+w.n })
		if m.t.Resident(p, 1) {
			if !writing && m.local[p] != m.app[p] {
				fail("page %d is %v with %d, want %d", p, st, m.local[p], m.app[p])
			}
		} else if m.remote[p] != m.app[p] && !writing {
			fail("page %d is %v, and the remote's %d is not %d", p, st, m.remote[p], m.app[p])
		}
		// What a crash of the process now would make of the page.
		if m.storeState[p] == Present {
			if m.local[p] != m.synced[p] {
				fail("page %d is recorded clean with %d, remote %d", p, m.local[p], m.synced[p])
			}
		}
	}
}

func (m *model) span(t *rapid.T) (page, n int64) {
	page = rapid.Int64Range(0, m.pages-1).Draw(t, "page")
	return page, rapid.Int64Range(1, min(m.pages-page, 70)).Draw(t, "n")
}

func pick[T any](t *rapid.T, s []T, name string) int {
	if len(s) == 0 {
		t.Skip("none")
	}
	return rapid.IntRange(0, len(s)-1).Draw(t, name)
}

func (m *model) actions() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"claim": func(t *rapid.T) {
			page, n := m.span(t)
			dup := rapid.Bool().Draw(t, "dup")
			f := m.t.Claim(page, n, dup)
			fetching := false
			for p := page; p < page+n; p++ {
				st := m.t.State(p)
				fetching = fetching || st == StateFetching
				if st == StateAbsent && m.drop.step == 0 {
					t.Fatalf("page %d still absent after a claim", p)
				}
			}
			if f == nil {
				return
			}
			if !fetching {
				t.Fatal("claimed, but nothing fetching")
			}
			m.fetches = append(m.fetches, &modelFetch{f, slices.Clone(m.remote[page : page+n]), make([]bool, n)})
		},
		"land": func(t *rapid.T) {
			i := pick(t, m.fetches, "fetch")
			f := m.fetches[i]
			a := rapid.Int64Range(0, f.f.N-1).Draw(t, "from")
			n := rapid.Int64Range(1, f.f.N-a).Draw(t, "n")
			for _, r := range m.t.Land(f.f, f.f.Page+a, n, nil) {
				o := r.Page - f.f.Page
				m.landing = append(m.landing, modelRun{r, f.data[o : o+r.N]})
			}
		},
		"landed": func(t *rapid.T) {
			i := pick(t, m.landing, "run")
			l := m.landing[i]
			ok := rapid.Bool().Draw(t, "ok")
			for p := l.r.Page; p < l.r.End(); p++ {
				if st := m.t.State(p); st != StateLanding {
					t.Fatalf("page %d is %v while it lands", p, st)
				}
				m.local[p] = l.data[p-l.r.Page]
				if !ok {
					m.local[p] = -1
				}
			}
			m.t.Landed(l.r, ok)
			m.landing = slices.Delete(m.landing, i, i+1)
		},
		"endFetch": func(t *rapid.T) {
			i := pick(t, m.fetches, "fetch")
			m.t.EndFetch(m.fetches[i].f)
			m.fetches = slices.Delete(m.fetches, i, i+1)
		},
		"beginZero": func(t *rapid.T) {
			page, n := m.span(t)
			if r := m.t.BeginZero(page, n); r.N > 0 {
				if r.Page < page || r.End() > page+n {
					t.Fatalf("run %v outside %d+%d", r, page, n)
				}
				m.zeroing = append(m.zeroing, r)
			}
		},
		"endZero": func(t *rapid.T) {
			i := pick(t, m.zeroing, "run")
			r := m.zeroing[i]
			ok := rapid.Bool().Draw(t, "ok")
			for p := r.Page; ok && p < r.End(); p++ {
				m.local[p] = m.remote[p] // they were zero, so to say
			}
			m.t.EndZero(r, ok)
			m.zeroing = slices.Delete(m.zeroing, i, i+1)
		},
		"beginWrite": func(t *rapid.T) {
			page, n := m.span(t)
			if busy := m.t.BeginWrite(page, n); busy >= 0 {
				st := m.t.State(busy)
				if st != StateLanding && st != StateWriting && m.commit != 2 && m.drop.step == 0 {
					t.Fatalf("page %d is %v and in the way", busy, st)
				}
				return
			}
			for _, r := range m.t.Intents(page, n, nil) {
				for p := r.Page; p < r.End(); p++ {
					if m.storeState[p] == Present {
						m.storeState[p] = Dirty
					}
				}
			}
			m.next++
			m.writes = append(m.writes, modelWrite{page, n, m.next})
			for p := page; p < page+n; p++ {
				if rapid.Bool().Draw(t, "early") {
					m.local[p] = m.next
				}
			}
		},
		"endWrite": func(t *rapid.T) {
			i := pick(t, m.writes, "write")
			w := m.writes[i]
			ok := rapid.IntRange(0, 4).Draw(t, "ok") > 0
			for p := w.page; p < w.page+w.n; p++ {
				if ok || m.t.Resident(p, 1) {
					m.local[p], m.app[p] = w.value, w.value
				}
			}
			m.t.EndWrite(w.page, w.n, ok)
			m.writes = slices.Delete(m.writes, i, i+1)
		},
		"beginPush": func(t *rapid.T) {
			page, n := m.span(t)
			r := m.t.BeginPush(page, n)
			if r.N == 0 {
				return
			}
			for _, p := range m.pushes {
				if p.r.Page < r.End() && r.Page < p.r.End() {
					t.Fatalf("%v pushed while %v is", r, p.r)
				}
			}
			m.pushes = append(m.pushes, modelPush{r, slices.Clone(m.local[r.Page:r.End()])})
		},
		"endPush": func(t *rapid.T) {
			i := pick(t, m.pushes, "push")
			p := m.pushes[i]
			ok := rapid.Bool().Draw(t, "ok")
			if ok {
				copy(m.remote[p.r.Page:p.r.End()], p.data)
			}
			m.t.EndPush(p.r, ok)
			m.pushes = slices.Delete(m.pushes, i, i+1)
		},
		"sync": func(t *rapid.T) {
			if len(m.pushes) > 0 {
				t.Skip("pushes under way")
			}
			ok := rapid.Bool().Draw(t, "ok")
			if ok {
				copy(m.synced, m.remote)
			} else if rapid.Bool().Draw(t, "lost") {
				for p := range m.pages {
					if !m.t.Resident(p, 1) && m.remote[p] != m.synced[p] {
						t.Fatalf("page %d was pushed and is absent", p)
					}
				}
				copy(m.remote, m.synced)
			}
			m.t.Synced(ok)
		},
		"commit": func(t *rapid.T) {
			m.outsideDrop(t)
			switch m.commit {
			case 0:
				m.t.BeginCommit()
				m.commit = 1
				m.disk = slices.Clone(m.local)
			case 1:
				m.changes = m.t.Commit()
				for _, c := range m.changes {
					for p := c.Page; p < c.Page+c.N; p++ {
						if c.State == Present && m.disk[p] != m.synced[p] {
							t.Fatalf("page %d to be recorded clean with %d on disk, remote %d", p, m.disk[p], m.synced[p])
						}
					}
				}
				m.commit = 2
			case 2:
				ok := rapid.Bool().Draw(t, "ok")
				if ok {
					for _, c := range m.changes {
						for p := c.Page; p < c.Page+c.N; p++ {
							m.storeState[p] = c.State
						}
					}
				}
				m.t.EndCommit(ok)
				m.commit = 0
			}
		},
		"": func(t *rapid.T) { m.check(t.Fatalf) },
	}
}

// settle ends everything that is under way and checks what must then hold.
func (m *model) settle(t *rapid.T) {
	for _, l := range m.landing {
		copy(m.local[l.r.Page:l.r.End()], l.data)
		m.t.Landed(l.r, true)
	}
	for _, f := range m.fetches {
		m.t.EndFetch(f.f)
	}
	for _, z := range m.zeroing {
		m.t.EndZero(z, false)
	}
	for _, w := range m.writes {
		for p := w.page; p < w.page+w.n; p++ {
			m.local[p], m.app[p] = w.value, w.value
		}
		m.t.EndWrite(w.page, w.n, true)
	}
	for _, p := range m.pushes {
		m.t.EndPush(p.r, false)
	}
	m.landing, m.fetches, m.zeroing, m.writes, m.pushes = nil, nil, nil, nil, nil
	m.settleDrop(t)
	if m.commit == 1 {
		m.t.Commit()
	}
	if m.commit > 0 {
		m.t.EndCommit(false)
	}
	m.check(t.Fatalf)
	for r := m.t.BeginPush(0, m.pages); r.N > 0; r = m.t.BeginPush(r.End(), m.pages) {
		copy(m.remote[r.Page:r.End()], m.local[r.Page:r.End()])
		m.t.EndPush(r, true)
	}
	copy(m.synced, m.remote)
	m.t.Synced(true)
	if !slices.Equal(m.remote, m.app) {
		t.Fatalf("remote after a push of everything:\n%v\nwant\n%v", m.remote, m.app)
	}
	m.t.BeginCommit()
	for _, c := range m.t.Commit() {
		for p := c.Page; p < c.Page+c.N; p++ {
			m.storeState[p] = c.State
		}
	}
	m.t.EndCommit(true)
	for p := range m.pages {
		if got, want := m.storeState[p] == Present, m.t.Resident(p, 1); got != want {
			t.Fatalf("page %d at rest is recorded as %v, resident %v", p, m.storeState[p], want)
		}
	}
	if c := m.t.Counts(); c.Dirty+c.Unsynced+c.Fetching+c.Landing+c.Writing+c.Pushing != 0 || len(m.t.slots) != 0 {
		t.Fatalf("at rest: %+v, %d slots", c, len(m.t.slots))
	}
	m.check(t.Fatalf)
}

func TestTableAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(rapid.Int64Range(1, 200).Draw(t, "pages"))
		t.Repeat(m.allActions())
		m.settle(t)
	})
}

// step is one step of a thread; false means that it can't be taken yet.
type step func(m *model) bool

func fetchSteps(dup bool) []step {
	var f *Fetch
	var data []int
	var runs []Run
	return []step{
		func(m *model) bool { f, runs = m.t.Claim(0, 2, dup), nil; return true },
		func(m *model) bool { data = slices.Clone(m.remote); return true },
		func(m *model) bool {
			if f != nil {
				runs = m.t.Land(f, 0, 2, nil)
			}
			return true
		},
		func(m *model) bool {
			for _, r := range runs {
				copy(m.local[r.Page:r.End()], data[r.Page:r.End()])
				m.t.Landed(r, true)
			}
			return true
		},
		func(m *model) bool {
			if f != nil {
				m.t.EndFetch(f)
			}
			return true
		},
	}
}

func writeSteps() []step {
	return []step{
		func(m *model) bool { m.inWrite = m.t.BeginWrite(0, 1) < 0; return m.inWrite },
		func(m *model) bool { m.local[0], m.app[0] = 100, 100; return true },
		func(m *model) bool { m.t.EndWrite(0, 1, true); m.inWrite = false; return true },
	}
}

func pushSteps() []step {
	var r Run
	var v int
	return []step{
		func(m *model) bool { r = m.t.BeginPush(0, 2); return true },
		func(m *model) bool { v = m.local[0]; return true },
		func(m *model) bool {
			if r.N > 0 {
				m.remote[0] = v
				m.t.EndPush(r, true)
			}
			return true
		},
	}
}

// TestInterleavings runs every order of the steps of fetches, a write of one of
// their pages, and a push.
func TestInterleavings(t *testing.T) {
	for _, c := range []struct {
		name    string
		threads [][]step
	}{
		{"fetch write push", [][]step{fetchSteps(false), writeSteps(), pushSteps()}},
		{"fetch dup write", [][]step{fetchSteps(false), fetchSteps(true), writeSteps()}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ended, cut := 0, 0
			walkOrders(t, c.threads, nil, &ended, &cut)
			if ended == 0 {
				t.Fatal("no order was run to its end")
			}
			t.Logf("%d orders, %d blocked", ended, cut)
		})
	}
}

// walkOrders replays an order from the start, then tries every way to go on.
func walkOrders(t *testing.T, threads [][]step, order []int, ended, cut *int) {
	m := &model{t: New(2, false), pages: 2, remote: []int{1, 2}, local: []int{-1, -1}, app: []int{1, 2}}
	at := make([]int, len(threads))
	for _, th := range order {
		if !threads[th][at[th]](m) {
			*cut++
			return // another order goes on from here
		}
		at[th]++
	}
	if err := m.t.Check(); err != nil {
		t.Fatalf("order %v: %v", order, err)
	}
	for p := range m.pages {
		if m.t.Resident(p, 1) && !m.inWrite && m.local[p] != m.app[p] {
			t.Fatalf("order %v: page %d is %v with %d, want %d", order, p, m.t.State(p), m.local[p], m.app[p])
		}
	}
	done := true
	for th := range threads {
		if at[th] < len(threads[th]) {
			done = false
			walkOrders(t, threads, append(slices.Clone(order), th), ended, cut)
		}
	}
	if !done {
		return
	}
	*ended++
	if r := m.t.BeginPush(0, 2); r.N > 0 {
		m.remote[0] = m.local[0]
		m.t.EndPush(r, true)
	}
	if !slices.Equal(m.remote, m.app) {
		t.Fatalf("order %v: remote %v, want %v", order, m.remote, m.app)
	}
}

func TestBitmapRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pages := rapid.Int64Range(1, 3*blockPages).Draw(t, "pages")
		m := newBitmap(pages)
		want := make([]bool, pages)
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			page := rapid.Int64Range(0, pages-1).Draw(t, "page")
			n := rapid.Int64Range(1, pages-page).Draw(t, "n")
			if rapid.Bool().Draw(t, "short") {
				n = min(n, 130)
			} else if rapid.Bool().Draw(t, "aligned") {
				page &^= blockPages - 1
				n = pages - page
			}
			v := rapid.Bool().Draw(t, "set")
			if v {
				m.setRange(page, n)
			} else {
				m.clearRange(page, n)
			}
			for p := page; p < page+n; p++ {
				want[p] = v
			}
			from := rapid.Int64Range(0, pages-1).Draw(t, "from")
			for _, v := range []bool{true, false} {
				w := from
				for w < pages && want[w] != v {
					w++
				}
				if got := m.next(from, pages, v); got != w {
					t.Fatalf("next(%d, %v) = %d, want %d", from, v, got, w)
				}
			}
		}
		var count int64
		for p, v := range want {
			if v {
				count++
			}
			if m.has(int64(p)) != v {
				t.Fatalf("page %d: %v, want %v", p, !v, v)
			}
		}
		if m.count != count {
			t.Fatalf("count %d, want %d", m.count, count)
		}
		if all := count == pages; m.all(0, pages) != all {
			t.Fatalf("all = %v, want %v", !all, all)
		}
	})
}

// A 1 TiB table is made, settled as zero and committed without looking at its
// pages one by one.
func TestHugeTable(t *testing.T) {
	const pages = 1 << 28
	allocs := testing.AllocsPerRun(1, func() {
		tb := New(pages, true)
		f := tb.Claim(pages/2, 64, false)
		for at := int64(0); at < pages; {
			r := tb.BeginZero(at, pages-at)
			if r.N == 0 {
				break
			}
			tb.EndZero(r, true)
			at = r.End()
		}
		for _, r := range tb.Land(f, pages/2, 64, nil) {
			tb.Landed(r, true)
		}
		tb.EndFetch(f)
		if !tb.Complete() {
			t.Fatalf("not complete: %+v", tb.Counts())
		}
		tb.BeginCommit()
		if c := tb.Commit(); len(c) != 1 || c[0] != (Change{0, pages, Present}) {
			t.Fatalf("commit: %v", c)
		}
		tb.EndCommit(true)
	})
	if allocs > 1000 {
		t.Fatalf("%v allocations", allocs)
	}
}

func TestResidentAllocatesNothing(t *testing.T) {
	tb := New(1<<20, false)
	if err := tb.Load(1000, 5000, false); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if !tb.Resident(1000, 5000) || tb.Resident(999, 2) {
			t.Fatal("wrong answer")
		}
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func BenchmarkWriteTransition(b *testing.B) {
	tb := New(1<<20, false)
	for i := int64(0); b.Loop(); i++ {
		p := i * 7919 % (1 << 20)
		tb.BeginWrite(p, 1)
		tb.EndWrite(p, 1, true)
	}
}

func ExampleTable() {
	t := New(4, false)
	f := t.Claim(0, 4, false)
	t.BeginWrite(1, 1) // takes page 1 out of the fetch
	fmt.Println(t.State(0), t.State(1))
	t.EndWrite(1, 1, true)
	for _, r := range t.Land(f, 0, 4, nil) {
		fmt.Println("land", r)
		t.Landed(r, true)
	}
	t.EndFetch(f)
	fmt.Println(t.State(0), t.State(1))
	// Output:
	// fetching writing
	// land {0 1}
	// land {2 2}
	// present dirty
}
