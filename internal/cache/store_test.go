package cache

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
	"github.com/memferry/memferry/internal/testenv"
)

const testPages = 300

func newStore(t testing.TB, d fsys, boot string, limit int64) *store {
	t.Helper()
	m := meta{URL: "mem:", Size: testPages << 12, PageSize: 4096, Cache: 77, Journal: 1, Clean: true}
	if err := createStore(d, m); err != nil {
		t.Fatal(err)
	}
	s, err := openStore(d, boot, limit)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// loaded is what Load says of each page.
func loaded(t testing.TB, s *store) []chunk.PageState {
	t.Helper()
	out := make([]chunk.PageState, s.pages.pages)
	last := int64(0)
	err := s.load(func(page, n int64, isDirty bool) error {
		if page < last || n <= 0 {
			t.Errorf("run of %d at %d after %d", n, page, last)
		}
		last = page + n
		for p := page; p < page+n; p++ {
			out[p] = chunk.Present
			if isDirty {
				out[p] = chunk.Dirty
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// step is an operation of a script and what it leads to.
type step func(s *store, model []chunk.PageState) error

func randomStep(r *rand.Rand) step {
	page, n := randomRun(r, testPages)
	if r.IntN(2) == 0 {
		return func(s *store, model []chunk.PageState) error {
			if err := s.intend(page, n); err != nil {
				return err
			}
			for p := page; p < page+n; p++ {
				if model[p] == chunk.Present {
					model[p] = chunk.Dirty
				}
			}
			return nil
		}
	}
	changes := make([]chunk.Change, 1+r.IntN(5))
	for i := range changes {
		page, n := randomRun(r, testPages)
		changes[i] = chunk.Change{Page: page, N: n, State: chunk.PageState(r.IntN(3))}
	}
	return func(s *store, model []chunk.PageState) error {
		if err := s.commit(changes); err != nil {
			return err
		}
		for _, c := range changes {
			for p := c.Page; p < c.Page+c.N; p++ {
				model[p] = c.State
			}
		}
		return nil
	}
}

// After the end of the process at any byte of the journal, the cache knows
// exactly what the records up to there say.
func TestJournalCutAtEveryByte(t *testing.T) {
	r := testenv.Rand(t)
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	model := make([]chunk.PageState, testPages)
	name := journalName(1)
	type mark struct {
		end   int
		model []chunk.PageState
	}
	marks := []mark{{journalHeader, slices.Clone(model)}, {len(d.inodes[name].data), slices.Clone(model)}}
	for range 25 {
		if err := randomStep(r)(s, model); err != nil {
			t.Fatal(err)
		}
		marks = append(marks, mark{len(d.inodes[name].data), slices.Clone(model)})
	}
	for cut := journalHeader; cut <= len(d.inodes[name].data); cut++ {
		var want []chunk.PageState
		for _, m := range marks {
			if m.end <= cut {
				want = m.model
			}
		}
		k := d.killed()
		k.inodes[name].data = k.inodes[name].data[:cut]
		for range 2 { // the second time, of what the first has made of it
			s, err := openStore(k, "boot", 1<<20)
			if err != nil {
				t.Fatalf("cut at %d: %v", cut, err)
			}
			if !slices.Equal(loaded(t, s), want) {
				t.Fatalf("cut at %d: wrong pages", cut)
			}
		}
	}
}

// No bit of a journal can turn without notice, while the machine stayed up.
func TestEveryBitOfTheJournalCounts(t *testing.T) {
	r := testenv.Rand(t)
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	model := make([]chunk.PageState, testPages)
	for range 8 {
		if err := randomStep(r)(s, model); err != nil {
			t.Fatal(err)
		}
	}
	name := journalName(1)
	for bit := range len(d.inodes[name].data) * 8 {
		k := d.killed()
		k.inodes[name].data[bit/8] ^= 1 << (bit % 8)
		if _, err := openStore(k, "boot", 1<<20); !errors.Is(err, memferry.ErrCorrupt) {
			t.Fatalf("bit %d: %v, want ErrCorrupt", bit, err)
		}
	}
}

// After a power cut, damage to what was known to be durable is told from what
// a power cut does.
func TestDamageBeforeTheDurableEndIsRefused(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	commit := func(page int64) int {
		if err := s.commit([]chunk.Change{{Page: page, N: 1, State: chunk.Dirty}}); err != nil {
			t.Fatal(err)
		}
		return len(d.inodes[journalName(1)].data)
	}
	end1, end2 := commit(1), commit(2)
	end3 := commit(3)
	for _, c := range []struct {
		at      int
		refused bool
	}{{end1 + 20, false}, {end2 + 20, false}, {end1 - 1, true}} {
		k := d.killed()
		k.inodes[journalName(1)].data[c.at] ^= 1
		_, err := openStore(k, "next boot", 1<<20)
		// The record after end1 was durable only as its own successor says,
		// which is in the third record for the one after end1, and nowhere for
		// the third.
		refused := c.refused || c.at < end2
		if errors.Is(err, memferry.ErrCorrupt) != refused {
			t.Errorf("damage at %d of %d/%d/%d: %v", c.at, end1, end2, end3, err)
		}
	}
}

func TestMissingJournalsAreRefused(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	d.full = true // checkpoints fail half-way, with the state
	s.commit([]chunk.Change{{Page: 1, N: 1, State: chunk.Dirty}})
	d.full = false
	k := d.killed()
	delete(k.inodes, journalName(1))
	if _, err := openStore(k, "boot", 1<<20); !errors.Is(err, memferry.ErrCorrupt) {
		t.Errorf("without the journal: %v", err)
	}
	s.mu.Lock()
	err := s.appendLocked(kindSeal, nil)
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(d.killed(), "boot", 1<<20); !errors.Is(err, memferry.ErrCorrupt) {
		t.Errorf("without the journal that goes on after the seal: %v", err)
	}
}

func TestGeneration(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	for _, pushing := range []bool{true, false} {
		gen := fmt.Sprintf("gen %t", pushing)
		if err := s.setGeneration(gen, pushing); err != nil {
			t.Fatal(err)
		}
		for _, d := range []*disk{d.killed(), d.powerLost(rand.New(rand.NewPCG(1, 2)))} {
			k, err := loadStore(d, "boot")
			if err != nil {
				t.Fatal(err)
			}
			if got, p := k.generation(); got != gen || p != pushing {
				t.Errorf("loaded %q, %t; want %q, %t", got, p, gen, pushing)
			}
		}
	}
	if err := s.setGeneration(string(make([]byte, maxGeneration+1)), false); err == nil {
		t.Error("a generation of any length is stored")
	}
}

func TestBadArguments(t *testing.T) {
	s := newStore(t, newDisk(), "boot", 1<<20)
	for _, c := range [][2]int64{{-1, 1}, {0, 0}, {0, testPages + 1}, {testPages, 1}, {1, 1<<63 - 1}} {
		if err := s.intend(c[0], c[1]); !errors.Is(err, memferry.ErrOutOfRange) {
			t.Errorf("intent of %d at %d: %v", c[1], c[0], err)
		}
		if err := s.commit([]chunk.Change{{Page: c[0], N: c[1]}}); !errors.Is(err, memferry.ErrOutOfRange) {
			t.Errorf("commit of %d at %d: %v", c[1], c[0], err)
		}
	}
	if err := s.commit([]chunk.Change{{Page: 0, N: 1, State: 9}}); err == nil {
		t.Error("an unknown state was committed")
	}
	if err := s.close(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.commit([]chunk.Change{{Page: 0, N: 1}}); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("commit after close: %v", err)
	}
	if err := s.setGeneration("x", false); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("SetGeneration after close: %v", err)
	}
}

func TestLargeCommit(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	changes := make([]chunk.Change, maxPayload/3)
	for i := range changes {
		changes[i] = chunk.Change{Page: int64(i % testPages), N: 1, State: chunk.PageState(i % 2)}
	}
	if err := s.commit(changes); err != nil {
		t.Fatal(err)
	}
	want := loaded(t, s)
	k, err := openStore(d.powerLost(rand.New(rand.NewPCG(1, 2))), "boot", 1<<20)
	if err != nil || !slices.Equal(loaded(t, k), want) {
		t.Errorf("after a crash: other pages, or %v", err)
	}
}

// world is a simulated machine: a disk, the data of a cache, a remote, and the
// discipline that a region follows. Data has one version number per page.
type world struct {
	r *rand.Rand
	d *disk

	remote  []int // versions
	data    []int // as processes see them
	synced  []int // on the medium
	acked   []int // what Sync acknowledged last
	written []int // the highest version ever written
	table   []chunk.PageState
	changed map[int]bool // since the last commit
	boots   int
}

func (w *world) boot() string { return fmt.Sprintf("boot %d", w.boots) }

func newWorld(r *rand.Rand) *world {
	w := &world{r: r, d: newDisk(), changed: map[int]bool{}}
	for _, p := range []*[]int{&w.remote, &w.data, &w.synced, &w.acked, &w.written} {
		*p = make([]int, testPages)
	}
	for i := range w.remote {
		w.remote[i] = 1
		w.written[i] = 1
		w.data[i], w.synced[i] = -1, -1 // nothing was fetched
	}
	w.table = make([]chunk.PageState, testPages)
	return w
}

// act does something that a region does, and stops at the first error.
func (w *world) act(s *store) error {
	p := w.r.IntN(testPages)
	switch w.r.IntN(5) {
	case 0: // pull
		if w.table[p] == chunk.Absent {
			w.data[p] = w.remote[p]
			w.table[p] = chunk.Present
			w.changed[p] = true
		}
	case 1, 2: // write
		if err := s.intend(int64(p), 1); err != nil {
			return err
		}
		w.written[p]++
		w.data[p] = w.written[p]
		w.table[p] = chunk.Dirty
		w.changed[p] = true
	case 3: // push
		if w.table[p] == chunk.Dirty {
			w.remote[p] = w.data[p]
			w.table[p] = chunk.Present
			w.changed[p] = true
		}
	case 4: // sync
		if w.r.IntN(4) == 0 {
			return w.sync(s)
		}
	}
	return nil
}

func (w *world) sync(s *store) error {
	copy(w.synced, w.data)
	var changes []chunk.Change
	for p := range w.changed {
		changes = append(changes, chunk.Change{Page: int64(p), N: 1, State: w.table[p]})
	}
	if err := s.commit(changes); err != nil {
		return err
	}
	clear(w.changed)
	for p, state := range w.table {
		if state == chunk.Dirty {
			w.acked[p] = w.data[p]
		} else if state == chunk.Present && w.acked[p] != 0 {
			w.acked[p] = w.data[p]
		}
	}
	return nil
}

// check loads the cache after a crash and checks invariants 1 and 2.
func (w *world) check(t *testing.T) *store {
	t.Helper()
	s, err := openStore(w.d, w.boot(), 600)
	if err != nil {
		t.Fatalf("after a crash: %v", err)
	}
	w.table = loaded(t, s)
	clear(w.changed)
	for p, state := range w.table {
		seen := w.data[p]
		if state == chunk.Absent {
			seen = w.remote[p]
		}
		switch {
		case state != chunk.Absent && w.data[p] < 0:
			t.Fatalf("page %d is %v, but was never fetched", p, state)
		case state == chunk.Present && w.data[p] != w.remote[p]:
			t.Fatalf("page %d is clean with version %d, the remote has %d", p, w.data[p], w.remote[p])
		case seen < w.acked[p]:
			t.Fatalf("page %d reads as version %d, but %d was synced", p, seen, w.acked[p])
		}
	}
	return s
}

func (w *world) lose(power bool) {
	if !power {
		w.d = w.d.killed()
		return
	}
	w.boots++
	w.d = w.d.powerLost(w.r)
	for p := range w.data {
		if w.r.IntN(2) == 0 {
			w.synced[p] = w.data[p] // it happened to be written
		}
		w.data[p] = w.synced[p]
	}
}

// A region's life with the end of the process or of the machine at any
// operation on the files, over and over.
func TestCrashAnywhere(t *testing.T) {
	seed := testenv.Seed(t)
	rounds := 300
	if testenv.Race || testing.Short() {
		rounds = 40
	}
	for round := range rounds {
		w := newWorld(rand.New(rand.NewPCG(uint64(seed), uint64(round))))
		s := newStore(t, w.d, w.boot(), 600)
		for range 12 {
			w.d.crashAt = w.d.steps + 1 + w.r.IntN(60)
			var err error
			for i := 0; err == nil; i++ {
				if i > 20 && w.r.IntN(200) == 0 {
					err = errors.Join(s.close(func() error { copy(w.synced, w.data); return nil }), errCrashed)
					break
				}
				err = w.act(s)
			}
			if !errors.Is(err, errCrashed) {
				t.Fatalf("round %d: %v", round, err)
			}
			w.lose(w.r.IntN(2) == 0)
			s = w.check(t)
			if t.Failed() {
				t.Fatalf("round %d", round)
			}
		}
	}
}

// A crash while the files are opened after a crash.
func TestCrashWhileRecovering(t *testing.T) {
	seed := testenv.Seed(t)
	for round := range 100 {
		w := newWorld(rand.New(rand.NewPCG(uint64(seed), uint64(round))))
		s := newStore(t, w.d, w.boot(), 600)
		w.d.crashAt = w.d.steps + 1 + w.r.IntN(200)
		for w.act(s) == nil {
		}
		w.lose(round%2 == 0)
		for i := 1; ; i++ {
			w.d.steps, w.d.crashAt = 0, i
			if _, err := openStore(w.d, w.boot(), 600); err == nil {
				break
			} else if !errors.Is(err, errCrashed) {
				t.Fatalf("round %d: %v", round, err)
			}
			w.d = w.d.killed()
		}
		w.d.crashAt = 0
		w.d = w.d.killed()
		w.check(t)
	}
}

// Everything that was true before the disk was full stays true, nothing that
// failed is claimed, and all works again when there is space.
func TestFullDiskRecovers(t *testing.T) {
	seed := testenv.Seed(t)
	for round := range 400 {
		w := newWorld(rand.New(rand.NewPCG(uint64(seed), uint64(round))))
		s := newStore(t, w.d, w.boot(), 600)
		for range 30 {
			w.d.full = w.r.IntN(2) == 0
			w.d.syncErr = w.r.IntN(10) == 0
			w.d.stuck = w.r.IntN(4) == 0
			for range w.r.IntN(30) {
				w.act(s) //nolint:errcheck // some fail
			}
		}
		if round%2 == 0 {
			w.lose(round%4 == 0)
			w.d.full, w.d.syncErr, w.d.stuck = false, false, false
			w.check(t)
			continue
		}
		w.d.full, w.d.syncErr, w.d.stuck = false, false, false
		if err := w.sync(s); err != nil {
			t.Fatalf("round %d: with space again: %v", round, err)
		}
		w.lose(true)
		w.check(t)
	}
}

func TestFsyncFailureIsNotForgotten(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	d.syncErr = true
	change := []chunk.Change{{Page: 1, N: 1, State: chunk.Dirty}}
	if err := s.commit(change); err == nil {
		t.Fatal("a commit without fsync was acknowledged")
	}
	d.syncErr = false
	if err := s.commit([]chunk.Change{{Page: 2, N: 1, State: chunk.Dirty}}); err != nil {
		t.Fatal(err)
	}
	k, err := openStore(d.powerLost(rand.New(rand.NewPCG(1, 2))), "next", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if got := loaded(t, k); got[2] != chunk.Dirty {
		t.Errorf("page 2 is %v after a commit that succeeded", got[2])
	}
}

func TestCleanCloseKeepsEverythingOverABoot(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	if err := s.commit([]chunk.Change{{Page: 0, N: 100, State: chunk.Present}, {Page: 5, N: 1, State: chunk.Dirty}}); err != nil {
		t.Fatal(err)
	}
	want := loaded(t, s)
	if err := s.close(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	k, err := openStore(d.powerLost(rand.New(rand.NewPCG(1, 2))), "next boot", 1<<20)
	if err != nil || !slices.Equal(loaded(t, k), want) {
		t.Errorf("other pages than before the close, or %v", err)
	}
	// Now in use, and the machine ends: only what is dirty is kept.
	k, err = openStore(k.fs.(*disk).killed(), "third boot", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if got := loaded(t, k); got[0] != chunk.Absent || got[5] != chunk.Dirty {
		t.Errorf("pages 0 and 5 are %v and %v after a power cut", got[0], got[5])
	}
}

func TestIntentsAreWrittenOnce(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	if err := s.commit([]chunk.Change{{Page: 0, N: 100, State: chunk.Present}}); err != nil {
		t.Fatal(err)
	}
	size := func() int { return len(d.inodes[journalName(1)].data) }
	intend := func(page, n int64, grows bool) {
		t.Helper()
		before := size()
		if err := s.intend(page, n); err != nil {
			t.Fatal(err)
		}
		if (size() > before) != grows {
			t.Errorf("intent of %d at %d: journal from %d to %d", n, page, before, size())
		}
	}
	intend(10, 1, true)
	intend(10, 1, false)
	intend(200, 50, false) // absent
	intend(9, 3, true)
	intend(9, 3, false)
	if got := testing.AllocsPerRun(100, func() { s.intend(9, 3) }); got != 0 {
		t.Errorf("a repeated intent allocates %v times", got)
	}
}

func TestJournalStaysShort(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1000)
	for i := range 5000 {
		p := int64(i % testPages)
		if err := s.commit([]chunk.Change{{Page: p, N: 1, State: chunk.Present}}); err != nil {
			t.Fatal(err)
		}
		if err := s.intend(p, 1); err != nil {
			t.Fatal(err)
		}
		for name, f := range d.inodes {
			if len(f.data) > 5000 {
				t.Fatalf("%s has %d bytes", name, len(f.data))
			}
		}
		if len(d.inodes) > 2 {
			t.Fatalf("%d files", len(d.inodes))
		}
	}
	// Intents alone, too.
	if err := s.commit([]chunk.Change{{Page: 0, N: testPages, State: chunk.Present}}); err != nil {
		t.Fatal(err)
	}
	for p := range int64(testPages) {
		if err := s.intend(p, 1); err != nil {
			t.Fatal(err)
		}
	}
	for name, f := range d.inodes {
		if len(f.data) > 5000 {
			t.Fatalf("%s has %d bytes", name, len(f.data))
		}
	}
	if _, err := openStore(d.killed(), "boot", 1000); err != nil {
		t.Fatal(err)
	}
}
