package region

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/memferry/memferry"
)

// change gives the remote other bytes, as somebody else would.
func (f *fakeRemote) change(off int64, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(f.data[off:], p)
	copy(f.synced[off:], p)
	f.tag++
}

// invalidate is a step of the model: somebody else changes the remote, and the
// region is told.
func (w *world) invalidate(off, n int64) error {
	if w.remote.tags { // only the whole can be
		off, n = 0, int64(len(w.want))
	}
	w.did = append(w.did, fmt.Sprintf("invalidate %d+%d", off, n))
	if err := w.r.Push(context.Background()); err != nil {
		return err
	}
	if w.rnd.IntN(3) > 0 { // of a page that is invalidated, any byte may have changed
		page, pages := pagesOf(off, n)
		at := page*pageSize + w.rnd.Int64N(pages*pageSize)
		at = min(at, int64(len(w.want))-1)
		p := pattern(1+w.rnd.Int64N(min((page+pages)*pageSize, int64(len(w.want)))-at), w.rnd.Uint64())
		if w.rnd.IntN(4) == 0 {
			clear(p)
		}
		w.remote.change(at, p)
		copy(w.want[at:], p)
	}
	err := w.r.Invalidate(context.Background(), off, n)
	for err != nil && !errors.Is(err, memferry.ErrChanged) { // the world is right only afterwards
		w.setFaults(false)
		err = w.r.Invalidate(context.Background(), off, n)
	}
	if err == nil {
		w.forget()
	}
	return err
}

// TestInvalidateOvertakesFetches: what was requested before is not seen after.
func TestInvalidateOvertakesFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRemote(bytes.Repeat([]byte{1}, 64*pageSize))
		f.piece = 0
		release := make(chan struct{})
		var once sync.Once
		first := make(chan struct{})
		slow := &oldReader{fakeRemote: f, reading: func() {
			once.Do(func() { close(first); <-release })
		}}
		r := open2(t, slow, newLocal(64*pageSize), Options{Pull: PullNone})
		got := make([]byte, pageSize)
		done := make(chan error, 1)
		go func() { _, err := r.ReadAt(got, 0); done <- err }()
		<-first // it has the old bytes, and holds them
		f.change(0, bytes.Repeat([]byte{2}, 64*pageSize))
		if err := r.Invalidate(t.Context(), 0, pageSize); err != nil {
			t.Fatal(err)
		}
		close(release)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadAt(got, 0); err != nil || got[0] != 2 || got[pageSize-1] != 2 {
			t.Errorf("after the old bytes had come: %v, %d", err, got[0])
		}
	})
}

// oldReader has a read wait with the bytes that it will return.
type oldReader struct {
	*fakeRemote
	reading func()
}

func (o *oldReader) Capabilities() memferry.Capabilities { return memferry.Capabilities{} }

func (o *oldReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.fakeRemote.ReadAt(p, off)
	o.reading()
	return n, err
}

// TestInvalidateOvertakesExtents: holes that were there before are not zeroes
// afterwards.
func TestInvalidateOvertakesExtents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRemote(make([]byte, 64*pageSize))
		f.holes = true
		f.hook = func(ctx context.Context, o op) error { // the search is faster than the pull
			if o.kind == "read" {
				sleep(ctx, time.Second)
			}
			return nil
		}
		release, asked := make(chan struct{}), make(chan struct{})
		var once sync.Once
		s := &oldMap{fakeRemote: f, asked: func() { once.Do(func() { close(asked); <-release }) }}
		r := open2(t, s, newLocal(64*pageSize), Options{Pull: PullFull})
		<-asked
		f.change(0, bytes.Repeat([]byte{2}, 64*pageSize))
		if err := r.Invalidate(t.Context(), 0, 64*pageSize); err != nil {
			t.Fatal(err)
		}
		close(release)
		if err := r.Pull(t.Context()); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 64*pageSize)
		if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, f.bytes()) {
			t.Errorf("%v, byte %d", err, got[0])
		}
	})
}

type oldMap struct {
	*fakeRemote
	asked func()
}

func (o *oldMap) Capabilities() memferry.Capabilities {
	return memferry.Capabilities{ContextReader: o.fakeRemote, Extenter: o}
}

func (o *oldMap) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	e, err := o.fakeRemote.Extents(ctx, off, n)
	o.asked()
	return e, err
}

// TestInvalidateComplete: a complete region is no longer, and becomes so again,
// holes without a transfer.
func TestInvalidateComplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pages = 1024
		f := newRemote(pattern(pages*pageSize, 1))
		f.holes = true
		r := open2(t, f, newLocal(pages*pageSize), Options{Rate: 1 << 20})
		if err := r.Pull(t.Context()); err != nil {
			t.Fatal(err)
		}
		was := r.Done()
		if !r.Complete() || r.Stats().Present != pages*pageSize {
			t.Fatal("not complete")
		}
		f.change(0, make([]byte, pages*pageSize))
		f.setHook(func(ctx context.Context, o op) error {
			if o.kind == "read" {
				sleep(ctx, time.Second)
			}
			return nil
		})
		before := r.Stats()
		if err := r.Invalidate(t.Context(), 0, pages*pageSize); err != nil {
			t.Fatal(err)
		}
		if r.Complete() || r.Resident(0, 1) || r.Done() == was {
			t.Error("still complete")
		}
		if err := r.Pull(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-r.Done()
		s := r.Stats()
		if !r.Complete() || s.SkippedBytes-before.SkippedBytes < pages*pageSize/2 {
			t.Errorf("complete: %v, %d bytes of holes were found again", r.Complete(), s.SkippedBytes-before.SkippedBytes)
		}
		got := make([]byte, pages*pageSize)
		if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, f.bytes()) {
			t.Errorf("%v", err)
		}
	})
}

// TestInvalidateWrites: what was written is pushed, not lost, and a remote that
// refuses keeps everything as it is.
func TestInvalidateWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRemote(pattern(16*pageSize, 1))
		r := open2(t, f, newLocal(16*pageSize), Options{PushInterval: -1, PushIdle: -1, IOTimeout: time.Second})
		want := pattern(pageSize, 2)
		if _, err := r.WriteAt(want, pageSize); err != nil {
			t.Fatal(err)
		}
		refused := errors.New("refused")
		f.setHook(func(_ context.Context, o op) error {
			if o.kind == "write" {
				return refused
			}
			return nil
		})
		if err := r.Invalidate(t.Context(), 0, 16*pageSize); !errors.Is(err, refused) {
			t.Errorf("a remote that refuses: %v", err)
		}
		f.setHook(nil)
		if err := r.Invalidate(t.Context(), 0, 16*pageSize); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, pageSize)
		if _, err := r.ReadAt(got, pageSize); err != nil || !bytes.Equal(got, want) || !bytes.Equal(f.bytes()[pageSize:2*pageSize], want) {
			t.Errorf("the write is gone (%v)", err)
		}
	})
}

// TestInvalidateGenerations: no mix of two versions.
func TestInvalidateGenerations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRemote(pattern(16*pageSize, 1))
		f.tags = true
		st := &fakeStore{state: make([]PageState, 16)}
		r := open2(t, f, newLocal(16*pageSize), Options{Store: st})
		if err := r.Pull(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := r.Invalidate(t.Context(), 0, pageSize); err != nil {
			t.Fatalf("a part of an unchanged remote: %v", err)
		}
		f.change(0, pattern(16*pageSize, 2))
		if err := r.Invalidate(t.Context(), 0, pageSize); !errors.Is(err, memferry.ErrChanged) {
			t.Fatalf("a part of a changed remote: %v", err)
		}
		if !r.Stats().Changed {
			t.Error("the change was not noticed")
		}
		if err := r.Invalidate(t.Context(), 0, 16*pageSize); err != nil {
			t.Fatal(err)
		}
		if tag, pushing := st.Generation(); r.Stats().Changed || tag != "g1" || pushing {
			t.Errorf("the new generation was not adopted: %q %v", tag, pushing)
		}
		time.Sleep(3 * generationPoll)
		got := make([]byte, 16*pageSize)
		if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, f.bytes()) {
			t.Errorf("after that: %v", err)
		}
		if slices.Contains(st.state, Dirty) {
			t.Error("something is dirty")
		}
	})
}

// keeper is a local backend that keeps some pages, and fails for some.
type keeper struct {
	*fakeLocal
	keep, fail int64 // pages
}

var errKeep = errors.New("can't forget")

func (k *keeper) Drop(_ context.Context, page, n int64) ([]Run, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var kept []Run
	for p := page; p < page+n; p++ {
		switch p {
		case k.keep:
			kept = append(kept, Run{Page: p, N: 1})
		case k.fail:
			return append(kept, Run{Page: p, N: page + n - p}), errKeep
		default:
			copy(k.data[p*pageSize:(p+1)*pageSize], bytes.Repeat([]byte{0xEE}, pageSize))
		}
	}
	return kept, nil
}

// TestInvalidateDropper: the local backend has the last word.
func TestInvalidateDropper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRemote(bytes.Repeat([]byte{1}, 16*pageSize))
		l := &keeper{newLocal(16 * pageSize), 3, 9}
		r := open2(t, f, l, Options{})
		if err := r.Pull(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.change(0, bytes.Repeat([]byte{2}, 16*pageSize))
		if err := r.Invalidate(t.Context(), 0, 16*pageSize); !errors.Is(err, errKeep) {
			t.Errorf("error: %v", err)
		}
		got := make([]byte, 16*pageSize)
		if _, err := r.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		for p := range 16 {
			want := byte(2)
			if p == 3 || p >= 9 {
				want = 1
			}
			if got[p*pageSize] != want || got[(p+1)*pageSize-1] != want {
				t.Errorf("page %d holds %d, want %d", p, got[p*pageSize], want)
			}
		}
	})
}

// TestInvalidateBusy: under writers that never pause, and a caller who gives
// up, it ends.
func TestInvalidateBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &slowLocal{newLocal(64 * pageSize)}
		r := open2(t, newRemote(pattern(64*pageSize, 1)), l, Options{PushInterval: -1, PushIdle: -1})
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for i := range int64(4) {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := r.WriteAt([]byte("busy"), i*8*pageSize+7); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		for range 20 {
			time.Sleep(1500 * time.Microsecond) // into the middle of writes
			if err := r.Invalidate(t.Context(), 0, 64*pageSize); err != nil {
				t.Error(err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.Invalidate(ctx, 0, pageSize); !errors.Is(err, context.Canceled) {
			t.Errorf("canceled: %v", err)
		}
		close(stop)
		wg.Wait()
		got := make([]byte, 4)
		for i := range int64(4) {
			if _, err := r.ReadAt(got, i*8*pageSize+7); err != nil || string(got) != "busy" {
				t.Errorf("%q, %v", got, err)
			}
		}
	})
}

// slowLocal takes its time to write.
type slowLocal struct{ *fakeLocal }

func (l *slowLocal) Capabilities() memferry.Capabilities { return memferry.Capabilities{} }

func (l *slowLocal) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(time.Millisecond)
	return l.fakeLocal.WriteAt(p, off)
}

// TestInvalidateWatched: who keeps copies is asked before, and told after.
func TestInvalidateWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := open2(t, newRemote(pattern(16*pageSize, 1)), newLocal(16*pageSize), Options{})
		var told []int64
		var refusal error
		stop := r.WatchInvalidate(func(_, _ int64) error { return refusal }, func(off, n int64) { told = append(told, off, n) })
		if err := r.Invalidate(t.Context(), pageSize, 5); err != nil || !slices.Equal(told, []int64{pageSize, 5}) {
			t.Errorf("%v, told %v", err, told)
		}
		refusal = memferry.ErrInUse
		if err := r.Invalidate(t.Context(), 0, 1); !errors.Is(err, memferry.ErrInUse) || len(told) != 2 || !r.Resident(2*pageSize, 1) && r.Complete() {
			t.Errorf("%v, told %v", err, told)
		}
		stop()
		if err := r.Invalidate(t.Context(), 0, 1); err != nil || len(told) != 2 {
			t.Errorf("%v, told %v", err, told)
		}
		for _, bad := range [][2]int64{{-1, 1}, {0, 16*pageSize + 1}, {16 * pageSize, 1}} {
			if err := r.Invalidate(t.Context(), bad[0], bad[1]); !errors.Is(err, memferry.ErrOutOfRange) {
				t.Errorf("%v: %v", bad, err)
			}
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := r.Invalidate(t.Context(), 0, 1); !errors.Is(err, memferry.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	})
}

// TestRate: what the bound on background pulls holds back is pulled later.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 4 << 20
		f := newRemote(pattern(n, 1))
		r := open2(t, f, newLocal(n), Options{Rate: 1 << 20})
		begin := time.Now()
		if err := r.Pull(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d < 3*time.Second { // of the bubble's clock
			t.Errorf("%d bytes came in %v", n, d)
		}
		if s := r.Stats(); s.PulledBytes != n {
			t.Errorf("pulled %d bytes of %d", s.PulledBytes, n)
		}
	})
}
