package region

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// world is a region with everything around it, and a []byte that says what it
// must read like. It runs in a synctest bubble: delays cost nothing.
type world struct {
	t      *testing.T
	rnd    *rand.Rand
	o      Options
	remote *fakeRemote
	local  *fakeLocal
	store  *fakeStore
	r      *Region
	faults bool

	want []byte
	// since holds, by page, the contents that it had since the last Sync: what
	// a crash may go back to.
	since [][][]byte
	did   []string
}

func newWorld(t *testing.T, seed uint64) *world {
	rnd := rand.New(rand.NewPCG(seed, 7))
	size := int64(1+rnd.IntN(200)) * pageSize
	if rnd.IntN(2) == 0 {
		size -= 1 + rnd.Int64N(pageSize-1)
	}
	w := &world{t: t, rnd: rnd, want: pattern(size, seed)}
	for range rnd.IntN(4) {
		off := rnd.Int64N(size)
		clear(w.want[off : off+rnd.Int64N(size-off)])
	}
	w.remote = newRemote(slices.Clone(w.want))
	w.remote.rnd = rand.New(rand.NewPCG(seed, 8))
	w.remote.holes, w.remote.tags = rnd.IntN(2) == 0, rnd.IntN(2) == 0
	w.remote.skew, w.remote.fences = rnd.IntN(2) == 0, rnd.IntN(2) == 0
	w.remote.piece = []int64{0, 1000, pageSize, 64 << 10}[rnd.IntN(4)]
	w.local = newLocal(size)
	w.local.holes = rnd.IntN(2) == 0
	w.o = Options{
		ChunkSize: pageSize << rnd.IntN(6), Pull: PullMode(rnd.IntN(3)), Durability: Durability(rnd.IntN(2)),
		PushInterval: []time.Duration{-1, 0, time.Millisecond}[rnd.IntN(3)], PushIdle: []time.Duration{-1, 0, time.Millisecond}[rnd.IntN(3)],
	}
	if rnd.IntN(3) == 0 {
		w.o.Priority = func(c int64) int { return int(c * 31 % 17) }
	}
	if rnd.IntN(4) > 0 {
		w.store = &fakeStore{state: make([]PageState, (size+pageSize-1)/pageSize)}
	}
	w.forget()
	return w
}

// hook delays and fails calls of the remote.
func (w *world) hook(rtt time.Duration) func(context.Context, op) error {
	rnd := rand.New(rand.NewPCG(w.rnd.Uint64(), 9))
	var mu sync.Mutex
	return func(ctx context.Context, o op) error {
		mu.Lock()
		d := rtt/2 + time.Duration(rnd.Int64N(int64(rtt)+1))
		fault := rnd.IntN(20)
		mu.Unlock()
		sleep(ctx, d)
		w.remote.mu.Lock()
		on := w.faults
		w.remote.mu.Unlock()
		switch {
		case on && fault == 0:
			return io.ErrUnexpectedEOF
		case on && fault == 1 && o.kind == "write":
			return errors.New("no")
		}
		return nil
	}
}

func (w *world) setFaults(v bool) {
	w.remote.mu.Lock()
	w.faults = v
	w.remote.mu.Unlock()
}

// forget begins a new history: nothing older may come back.
func (w *world) forget() {
	w.since = make([][][]byte, (len(w.want)+pageSize-1)/pageSize)
	for p := range w.since {
		w.note(int64(p))
	}
}

func (w *world) page(b []byte, p int64) []byte {
	return b[p*pageSize : min((p+1)*pageSize, int64(len(b)))]
}

func (w *world) note(p int64) {
	w.since[p] = append(w.since[p], slices.Clone(w.page(w.want, p)))
}

func (w *world) open() {
	w.remote.closed, w.remote.once, w.remote.session = make(chan struct{}), sync.Once{}, newSession()
	o := w.o
	if w.store != nil {
		o.Store = w.store
	}
	w.setFaults(false)
	r, err := Open(context.Background(), w.remote, w.local, o)
	if err != nil {
		w.fatalf("open: %v", err)
	}
	w.r = r
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	if n := len(w.did); n > 30 {
		w.did = w.did[n-30:]
	}
	w.t.Fatalf("%s\nlast steps: %v\noptions: %+v", fmt.Sprintf(format, args...), w.did, w.o)
}

func (w *world) span() (off, n int64) {
	size := int64(len(w.want))
	off = w.rnd.Int64N(size)
	n = 1 + w.rnd.Int64N(min(size-off, []int64{100, 3 * pageSize, 64 * pageSize}[w.rnd.IntN(3)]))
	if w.rnd.IntN(2) == 0 {
		end := min((off+n+pageSize-1)&^(pageSize-1), size)
		off &^= pageSize - 1
		n = end - off
	}
	return off, n
}

func (w *world) changed(off, n int64) {
	page, pages := pagesOf(off, n)
	for p := page; p < page+pages; p++ {
		w.note(p)
	}
}

func (w *world) step() {
	off, n := w.span()
	if w.rnd.IntN(3) == 0 { // into the middle of what goes on behind
		time.Sleep(time.Duration(w.rnd.IntN(2000)) * time.Microsecond)
	}
	var err error
	switch k := w.rnd.IntN(100); {
	case k < 40:
		w.did = append(w.did, fmt.Sprintf("read %d+%d", off, n))
		p := make([]byte, n)
		if _, err = w.r.ReadAt(p, off); err == nil && !bytes.Equal(p, w.want[off:off+n]) {
			i := 0
			for p[i] == w.want[off+int64(i)] {
				i++
			}
			w.fatalf("read %d+%d differs from byte %d on: %x, want %x, page is %v", off, n, off+int64(i), p[i], w.want[off+int64(i)], w.r.table.State((off+int64(i))/pageSize))
		}
	case k < 75:
		w.did = append(w.did, fmt.Sprintf("write %d+%d", off, n))
		p := pattern(n, w.rnd.Uint64())
		if _, err = w.r.WriteAt(p, off); err == nil {
			copy(w.want[off:], p)
			w.changed(off, n)
		}
	case k < 82:
		w.did = append(w.did, fmt.Sprintf("zero %d+%d", off, n))
		if w.rnd.IntN(2) == 0 {
			err = w.r.Trim(off, n)
		} else {
			err = w.r.WriteZeroes(off, n, memferry.ZeroNoHole)
		}
		if err == nil {
			clear(w.want[off : off+n])
			w.changed(off, n)
		}
	case k < 86:
		w.did = append(w.did, "sync")
		if err = w.r.Sync(); err == nil {
			w.forget()
			if w.o.Durability == DurabilityRemote {
				w.compareRemote("sync")
			}
		}
	case k < 89:
		w.did = append(w.did, "push")
		if err = w.r.Push(context.Background()); err == nil {
			w.compareRemote("push")
		}
	case k < 92:
		w.did = append(w.did, "extents")
		_, err = w.r.Extents(context.Background(), off, n)
	case k < 93:
		err = w.invalidate(off, n)
	case k < 94:
		w.setFaults(w.rnd.IntN(2) == 0)
	case k < 97:
		time.Sleep(time.Duration(w.rnd.IntN(3000)) * time.Millisecond)
	case k < 98:
		w.restart()
	case k < 99 && w.store != nil:
		w.kill()
	}
	if err != nil {
		w.did = append(w.did, err.Error())
	}
	for _, bad := range []error{memferry.ErrClosed, memferry.ErrChanged, memferry.ErrOutOfRange, memferry.ErrTimeout} {
		if errors.Is(err, bad) { // none that the faults explain
			w.fatalf("error: %v", err)
		}
	}
	w.remote.mu.Lock()
	bad := w.remote.bad
	w.remote.mu.Unlock()
	if bad != nil {
		w.fatalf("%v", bad)
	}
}

// compareRemote checks that the remote has, and keeps, everything.
func (w *world) compareRemote(after string) {
	w.remote.mu.Lock()
	defer w.remote.mu.Unlock()
	if !bytes.Equal(w.remote.data, w.want) {
		w.fatalf("after %s the remote differs", after)
	}
	if !bytes.Equal(w.remote.synced, w.want) {
		w.fatalf("after %s the remote could lose writes", after)
	}
}

// restart closes and opens. Without a store everything must have been pushed.
func (w *world) restart() {
	w.did = append(w.did, "restart")
	w.setFaults(false)
	if err := w.r.Close(); err != nil {
		w.fatalf("close: %v", err)
	}
	w.compareRemote("close")
	if w.store != nil && slices.Contains(w.store.state, Dirty) {
		w.fatalf("pages are recorded as dirty after a clean close")
	}
	if w.store == nil {
		w.local = newLocal(int64(len(w.want)))
	}
	w.forget()
	w.open()
}

// kill ends the process, so to say: local bytes and intents stay, everything
// else that was not committed is gone.
func (w *world) kill() {
	w.did = append(w.did, "kill")
	w.store.mu.Lock()
	w.local.mu.Lock()
	w.remote.mu.Lock()
	w.store.dead, w.local.dead = true, true
	store := &fakeStore{state: slices.Clone(w.store.state), gen: w.store.gen, pushing: w.store.pushing, session: w.store.session}
	local := &fakeLocal{data: slices.Clone(w.local.data), holes: w.local.holes}
	remote := newRemote(slices.Clone(w.remote.data))
	remote.synced = slices.Clone(w.remote.synced)
	remote.holes, remote.tags, remote.skew, remote.piece = w.remote.holes, w.remote.tags, w.remote.skew, w.remote.piece
	remote.rnd, remote.tag, remote.hook = rand.New(rand.NewPCG(w.rnd.Uint64(), 8)), w.remote.tag, w.remote.hook
	remote.loseSync = w.remote.loseSync
	// What is under way stays so, where it can be fenced; elsewhere it is over
	// before the next process begins.
	remote.fences, remote.late = w.remote.fences, slices.Collect(maps.Keys(w.remote.inFlight))
	slices.SortFunc(remote.late, func(a, b *lateWrite) int { return int(a.off - b.off) })
	if !remote.fences {
		remote.surprise()
	}
	_ = w.remote.Close()
	w.remote.mu.Unlock()
	w.local.mu.Unlock()
	w.store.mu.Unlock()
	_ = w.r.Close()
	w.store, w.local, w.remote = store, local, remote
	w.open()
	got := make([]byte, len(w.want))
	if _, err := w.r.ReadAt(got, 0); err != nil {
		w.fatalf("read after a crash: %v", err)
	}
	for p := range w.since {
		now := w.page(got, int64(p))
		if !slices.ContainsFunc(w.since[p], func(old []byte) bool { return bytes.Equal(old, now) }) {
			w.fatalf("page %d holds after a crash what it had not held since the last Sync (%d versions)", p, len(w.since[p]))
		}
	}
	w.want = got
	w.forget()
}

func (w *world) run(steps int) {
	w.remote.hook = w.hook([]time.Duration{0, time.Millisecond, 50 * time.Millisecond}[w.rnd.IntN(3)])
	if w.rnd.IntN(3) == 0 {
		rnd := rand.New(rand.NewPCG(w.rnd.Uint64(), 1))
		w.remote.loseSync = func() bool { return w.faults && rnd.IntN(8) == 0 }
	}
	w.open()
	for range steps {
		w.step()
	}
	w.restart()
	if w.o.Pull == PullFull {
		if err := w.r.Pull(context.Background()); err != nil {
			w.fatalf("pull: %v", err)
		}
	}
	got := make([]byte, len(w.want))
	if _, err := w.r.ReadAt(got, 0); err != nil || !bytes.Equal(got, w.want) {
		w.fatalf("final read: %v, equal %v", err, bytes.Equal(got, w.want))
	}
	if err := w.r.Close(); err != nil {
		w.fatalf("close: %v", err)
	}
}

func TestAgainstModel(t *testing.T) {
	seed := uint64(testenv.Seed(t))
	runs, steps := 300, 200
	if testing.Short() {
		runs = 50
	}
	t.Logf("%d steps, in %d regions with seeds from %d on", runs*steps, runs, seed)
	for i := range runs {
		s := seed + uint64(i)
		if !t.Run(fmt.Sprintf("seed=%d", s), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newWorld(t, s).run(steps) })
		}) {
			return
		}
	}
}

// TestConcurrentWriters has several writers with pages of their own, which
// must always read what they wrote, while everything else goes on.
func TestConcurrentWriters(t *testing.T) {
	seed := uint64(testenv.Seed(t))
	for i := range uint64(10) {
		synctest.Test(t, func(t *testing.T) { concurrentWriters(t, seed+i) })
	}
}

func concurrentWriters(t *testing.T, seed uint64) {
	const writers, pages = 4, 300
	f := newRemote(pattern(pages*pageSize, seed))
	f.rnd = rand.New(rand.NewPCG(seed, 1))
	f.skew, f.holes = seed%2 == 0, seed%3 == 0
	f.hook = func(ctx context.Context, o op) error { sleep(ctx, time.Millisecond); return nil }
	st := &fakeStore{state: make([]PageState, pages)}
	r, err := Open(context.Background(), f, newLocal(pages*pageSize), Options{ChunkSize: 32 << 10, Store: st, PushInterval: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	want := f.bytes()
	var wg sync.WaitGroup
	for id := range int64(writers) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(id)))
			for range 400 {
				// Runs of pages of one's own, between those of others.
				off := (rnd.Int64N(pages/writers/4)*writers + id) * 4 * pageSize
				n := 1 + rnd.Int64N(4*pageSize)
				off += rnd.Int64N(4*pageSize - n + 1)
				switch rnd.IntN(4) {
				case 0:
					p := pattern(n, rnd.Uint64())
					if _, err := r.WriteAt(p, off); err != nil {
						t.Error(err)
					}
					copy(want[off:], p)
				case 1:
					if err := r.Trim(off, n); err != nil {
						t.Error(err)
					}
					clear(want[off : off+n])
				case 2:
					p := make([]byte, n)
					if _, err := r.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:off+n]) {
						t.Errorf("read %d+%d: %v, equal %v", off, n, err, bytes.Equal(p, want[off:off+n]))
					}
				case 3:
					if rnd.IntN(10) == 0 {
						if err := errors.Join(r.Sync(), r.Push(context.Background())); err != nil {
							t.Error(err)
						}
					}
					sleep(context.Background(), time.Duration(rnd.IntN(100))*time.Microsecond)
				}
			}
		})
	}
	wg.Wait()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if f.bad != nil {
		t.Fatal(f.bad)
	}
	if !bytes.Equal(f.data, want) {
		t.Fatal("the remote differs in the end")
	}
}
