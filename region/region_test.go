package region

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/mem"
)

func TestPullEverything(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(f *fakeRemote)
	}{
		{"stream", func(*fakeRemote) {}},
		{"plain", func(f *fakeRemote) { f.piece = 0 }},
		{"extents", func(f *fakeRemote) { f.holes = true; clear(f.data[1<<20 : 30<<20]) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			const size = 33<<20 + 777
			f := newRemote(pattern(size, 1))
			c.set(f)
			want := f.bytes()
			r := open2(t, f, newLocal(size), Options{})
			if err := r.Pull(deadline(t)); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if n, err := r.ReadAt(got, 0); n != size || err != nil {
				t.Fatalf("read %d bytes: %v", n, err)
			}
			if !bytes.Equal(got, want) {
				t.Fatal("wrong bytes")
			}
			s := r.Stats()
			if s.Present != size || !s.PullComplete || s.PulledBytes+s.SkippedBytes != size {
				t.Fatalf("stats: %+v", s)
			}
			if f.holes && s.SkippedBytes == 0 {
				t.Fatal("holes were transferred")
			}
		})
	}
}

func TestWriteAndPush(t *testing.T) {
	const size = 1<<20 + 100
	f := newRemote(pattern(size, 2))
	want := f.bytes()
	r := open2(t, f, newLocal(size), Options{PushInterval: -1, PushIdle: -1, PushBacklog: -1})
	write := func(p []byte, off int64) {
		t.Helper()
		if n, err := r.WriteAt(p, off); n != len(p) || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
		copy(want[off:], p)
	}
	write(pattern(3*pageSize, 3), 4*pageSize) // whole pages
	write(pattern(100, 4), 20*pageSize+17)    // part of one
	write(pattern(100, 5), size-100)          // the short tail, wholly
	write(pattern(10000, 6), 30*pageSize+5)   // parts and wholes
	if err := r.Trim(50*pageSize-7, 3*pageSize); err != nil {
		t.Fatal(err)
	}
	clear(want[50*pageSize-7 : 53*pageSize-7])
	got := make([]byte, size)
	if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read back: %v, equal %v", err, bytes.Equal(got, want))
	}
	if bytes.Equal(f.bytes(), want) {
		t.Fatal("pushed too early")
	}
	if err := r.Push(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.bytes(), want) || !bytes.Equal(f.synced, want) {
		t.Fatal("the remote lacks writes")
	}
	if s := r.Stats(); s.Dirty+s.Pushing+s.Unsynced != 0 || s.PushedBytes == 0 {
		t.Fatalf("stats: %+v", s)
	}
}

func TestClosePushes(t *testing.T) {
	f := newRemote(pattern(1<<20, 1))
	r := open2(t, f, newLocal(1<<20), Options{PushInterval: -1, PushIdle: -1, PushBacklog: -1})
	p := pattern(pageSize, 9)
	if _, err := r.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.bytes()[:pageSize], p) {
		t.Fatal("not pushed")
	}
	if err := r.Close(); err != nil {
		t.Fatalf("second close: %v", err)
	}
	if _, err := r.ReadAt(p, 0); !errors.Is(err, memferry.ErrClosed) {
		t.Fatalf("read after close: %v", err)
	}
	if _, err := r.WriteAt(p, 0); !errors.Is(err, memferry.ErrClosed) {
		t.Fatalf("write after close: %v", err)
	}
}

// hold returns a hook that stops calls of a kind until release is called.
func hold(match func(o op) bool) (hook func(ctx context.Context, o op) error, held <-chan op, release func()) {
	ch, gate := make(chan op, 10000), make(chan struct{})
	return func(ctx context.Context, o op) error {
		if !match(o) {
			return nil
		}
		ch <- o
		select {
		case <-gate:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}, ch, sync.OnceFunc(func() { close(gate) })
}

func TestDemandPassesBackground(t *testing.T) {
	const size = 64 << 20
	f := newRemote(pattern(size, 1))
	hook, held, release := hold(func(o op) bool { return o.kind == "read" && o.class != memferry.ClassDemand })
	defer release()
	f.hook = hook
	r := open2(t, f, newLocal(size), Options{})
	<-held
	p := make([]byte, 2*pageSize)
	for _, off := range []int64{0, size / 2, 5*pageSize + 1, size - 100} {
		n, err := r.ReadAtContext(deadline(t), p, off)
		if err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(p[:n], f.bytes()[off:off+int64(n)]) {
			t.Fatalf("read at %d while the background hangs: %v", off, err)
		}
	}
	release()
	if err := r.Pull(deadline(t)); err != nil {
		t.Fatal(err)
	}
}

func TestWriteTakesFetchOver(t *testing.T) {
	const size = 1 << 20
	f := newRemote(pattern(size, 1))
	hook, held, release := hold(func(o op) bool { return o.kind == "read" })
	defer release()
	f.hook = hook
	r := open2(t, f, newLocal(size), Options{PushInterval: -1, PushIdle: -1})
	<-held
	p := pattern(3*pageSize, 8)
	if _, err := r.WriteAt(p, pageSize); err != nil { // must not wait
		t.Fatal(err)
	}
	want := f.bytes()
	copy(want[pageSize:], p)
	release()
	if err := r.Pull(deadline(t)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("stale bytes won: %v", err)
	}
	eventually(t, "dropped bytes counted", func() bool { return r.Stats().DroppedBytes >= 3*pageSize })
}

func TestReadAheadGrows(t *testing.T) {
	const size = 64 << 20
	f := newRemote(pattern(size, 1))
	f.hook = func(context.Context, op) error { time.Sleep(5 * time.Millisecond); return nil }
	r := open2(t, f, newLocal(size), Options{Pull: PullDemand})
	p := make([]byte, 64<<10)
	for off := int64(0); off < 32<<20; off += int64(len(p)) {
		if _, err := r.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, f.data[off:off+int64(len(p))]) {
			t.Fatalf("wrong bytes at %d", off)
		}
	}
	s := r.Stats()
	if s.DemandReads > 64 {
		t.Fatalf("%d demand requests for 512 sequential reads", s.DemandReads)
	}
	if s.Present == size {
		t.Fatal("everything was fetched")
	}
}

func TestPullNoneFetchesWhatIsRead(t *testing.T) {
	const size = 8 << 20
	f := newRemote(pattern(size, 1))
	r := open2(t, f, newLocal(size), Options{Pull: PullNone})
	p := make([]byte, 100)
	if _, err := r.ReadAt(p, 5*pageSize-50); err != nil {
		t.Fatal(err)
	}
	if s := r.Stats(); s.Present != 2*pageSize {
		t.Fatalf("present: %d", s.Present)
	}
	if err := r.Pull(deadline(t)); err != nil { // may still be asked to
		t.Fatal(err)
	}
}

func TestFullLocalMedium(t *testing.T) {
	const size = 1 << 20
	f := newRemote(pattern(size, 1))
	l := newLocal(size)
	l.full = true
	r := open2(t, f, l, Options{})
	p := make([]byte, 3*pageSize)
	for off := int64(0); off+int64(len(p)) < size; off += 100001 {
		if _, err := r.ReadAt(p, off); err != nil || !bytes.Equal(p, f.data[off:off+int64(len(p))]) {
			t.Fatalf("read at %d with a full medium: %v", off, err)
		}
	}
	if _, err := r.WriteAt(p, 0); !errors.Is(err, memferry.ErrNoSpace) {
		t.Fatalf("write to a full medium: %v", err)
	}
	if e := r.Stats().Errors; !slices.ContainsFunc(e, func(e ErrorStat) bool { return e.Kind == ErrorLocal }) {
		t.Fatalf("errors: %v", e)
	}
	l.setFull(false)
	if err := r.Pull(deadline(t)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, f.data) {
		t.Fatalf("after the medium has room again: %v", err)
	}
}

func TestRemoteFailures(t *testing.T) {
	const size = 1 << 20
	f := newRemote(pattern(size, 1))
	bad := errors.New("medium error")
	f.hook = func(_ context.Context, o op) error {
		if o.kind == "read" {
			return bad
		}
		return nil
	}
	r := open2(t, f, newLocal(size), Options{IOTimeout: 10 * time.Second})
	p := make([]byte, pageSize)
	if _, err := r.ReadAt(p, 0); !errors.Is(err, bad) {
		t.Fatalf("read: %v", err)
	}
	f.setHook(func(_ context.Context, o op) error {
		if o.kind == "read" {
			return io.ErrUnexpectedEOF // as a lost connection
		}
		return nil
	})
	done := make(chan error)
	go func() {
		_, err := r.ReadAt(p, 10*pageSize)
		done <- err
	}()
	eventually(t, "remote seen as down", func() bool { return !r.Stats().RemoteUp })
	f.setHook(nil)
	if err := <-done; err != nil || !bytes.Equal(p, f.data[10*pageSize:11*pageSize]) {
		t.Fatalf("read through an outage: %v", err)
	}
	if err := r.Pull(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if !r.Stats().RemoteUp {
		t.Fatal("remote seen as down")
	}
}

func TestReadTimesOut(t *testing.T) {
	f := newRemote(pattern(1<<20, 1))
	hook, _, release := hold(func(o op) bool { return o.kind == "read" })
	defer release()
	f.hook = hook
	r := open2(t, f, newLocal(1<<20), Options{IOTimeout: 50 * time.Millisecond})
	if _, err := r.ReadAt(make([]byte, 10), 0); !errors.Is(err, memferry.ErrTimeout) && !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("read: %v", err)
	}
	release()
	eventually(t, "reads work again", func() bool {
		_, err := r.ReadAt(make([]byte, 10), 0)
		return err == nil
	})
}

// TestAbandon has Close, and a Push under way, not wait for a remote that does
// not answer.
func TestAbandon(t *testing.T) {
	f := newRemote(pattern(1<<20, 1))
	hook, held, release := hold(func(o op) bool { return o.kind == "write" })
	defer release()
	f.hook = hook
	o := Options{Pull: PullNone, PushInterval: -1, PushIdle: -1, PushBacklog: -1, IOTimeout: time.Hour}
	r := open2(t, f, newLocal(1<<20), o)
	if _, err := r.WriteAt(pattern(pageSize, 9), 0); err != nil {
		t.Fatal(err)
	}
	pushed := make(chan error)
	go func() { pushed <- r.Push(deadline(t)) }()
	<-held
	r.Abandon()
	if err := <-pushed; !errors.Is(err, errAbandoned) {
		t.Errorf("Push: %v, want %v", err, errAbandoned)
	}
	if err := r.Close(); !errors.Is(err, errAbandoned) || !strings.Contains(err.Error(), "4096 bytes") {
		t.Errorf("Close: %v, want what was lost", err)
	}
}

func TestCloseUnblocksReads(t *testing.T) {
	f := newRemote(pattern(1<<20, 1))
	hook, held, release := hold(func(o op) bool { return o.kind == "read" })
	defer release()
	f.hook = hook
	r := open2(t, f, newLocal(1<<20), Options{Pull: PullNone})
	done := make(chan error)
	go func() {
		_, err := r.ReadAt(make([]byte, 10), 0)
		done <- err
	}()
	<-held
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, memferry.ErrClosed) {
		t.Fatalf("pending read: %v", err)
	}
}

func TestFailedPushStaysDirty(t *testing.T) {
	f := newRemote(pattern(1<<20, 1))
	full := errors.New("remote is full")
	f.hook = func(_ context.Context, o op) error {
		if o.kind == "write" {
			return full
		}
		return nil
	}
	r := open2(t, f, newLocal(1<<20), Options{IOTimeout: time.Second})
	p := pattern(pageSize, 7)
	if _, err := r.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Push(deadline(t)); !errors.Is(err, full) {
		t.Fatalf("push: %v", err)
	}
	if s := r.Stats(); s.Dirty != pageSize {
		t.Fatalf("stats: %+v", s)
	}
	if err := r.Close(); !errors.Is(err, full) {
		t.Fatalf("close: %v", err)
	} else {
		t.Log(err)
	}
}

func TestLostSyncPushesAgain(t *testing.T) {
	f := newRemote(pattern(1<<20, 1))
	lose := 2
	f.loseSync = func() bool { lose--; return lose >= 0 }
	r := open2(t, f, newLocal(1<<20), Options{PushInterval: -1, PushIdle: -1})
	p := pattern(10*pageSize, 7)
	if _, err := r.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Push(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.bytes()[:len(p)], p) {
		t.Fatal("lost")
	}
}

func TestPushTriggers(t *testing.T) {
	for _, c := range []struct {
		name string
		o    Options
	}{
		{"interval", Options{PushInterval: 20 * time.Millisecond, PushIdle: -1, PushBacklog: -1}},
		{"idle", Options{PushInterval: -1, PushIdle: 20 * time.Millisecond, PushBacklog: -1}},
		{"backlog", Options{PushInterval: -1, PushIdle: -1, PushBacklog: 4 * pageSize}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newRemote(pattern(1<<20, 1))
			r := open2(t, f, newLocal(1<<20), c.o)
			for i := range int64(4) {
				if _, err := r.WriteAt(pattern(pageSize, 7), 2*i*pageSize); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "pushed", func() bool { s := r.Stats(); return s.PushedBytes > 0 && s.Dirty+s.Pushing == 0 })
		})
	}
}

func TestReadOnly(t *testing.T) {
	f := newRemote(pattern(1<<20, 1))
	r := open2(t, f, newLocal(1<<20), Options{ReadOnly: true})
	if _, err := r.WriteAt([]byte{1}, 0); !errors.Is(err, memferry.ErrReadOnly) {
		t.Fatalf("write: %v", err)
	}
	if err := r.Trim(0, 10); !errors.Is(err, memferry.ErrReadOnly) {
		t.Fatalf("trim: %v", err)
	}
	if err := errors.Join(r.Sync(), r.Push(deadline(t)), r.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestGenerationChanged(t *testing.T) {
	const size = 1 << 20
	f := newRemote(pattern(size, 1))
	f.tags = true
	st := &fakeStore{state: make([]PageState, size/pageSize)}
	l := newLocal(size)
	r := open2(t, f, l, Options{Pull: PullNone, Store: st, PushInterval: -1, PushIdle: -1})
	if _, err := r.WriteAt(pattern(pageSize, 3), 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Push(deadline(t)); err != nil {
		t.Fatal(err)
	}
	r.settleGeneration() // our own push is adopted
	r.checkGeneration()
	if s := r.Stats(); s.Changed {
		t.Fatalf("own push taken for another's: %+v", s)
	}
	if _, err := f.WriteAt(pattern(10, 4), 0); err != nil { // somebody else
		t.Fatal(err)
	}
	r.checkGeneration()
	if _, err := r.ReadAt(make([]byte, 10), 5*pageSize); !errors.Is(err, memferry.ErrChanged) {
		t.Fatalf("read of an absent page: %v", err)
	}
	if _, err := r.ReadAt(make([]byte, 10), 0); err != nil {
		t.Fatalf("read of a present page: %v", err)
	}
	if _, err := r.WriteAt(pattern(pageSize, 3), 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Push(deadline(t)); !errors.Is(err, memferry.ErrChanged) {
		t.Fatalf("push: %v", err)
	}
	if err := r.Close(); !errors.Is(err, memferry.ErrChanged) {
		t.Fatalf("close: %v", err)
	}
	f.closed, f.once = make(chan struct{}), sync.Once{}
	if _, err := Open(context.Background(), f, l, Options{Store: st}); !errors.Is(err, memferry.ErrChanged) {
		t.Fatalf("open: %v", err)
	}
}

func TestHugeSparseRegion(t *testing.T) {
	const size = 1 << 40
	remote, err := mem.New(size)
	if err != nil {
		t.Fatal(err)
	}
	local, err := mem.New(size)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := remote.WriteAt([]byte("far"), size-100); err != nil {
		t.Fatal(err)
	}
	r := open2(t, remote, local, Options{})
	if err := r.Pull(deadline(t)); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 3)
	if _, err := r.ReadAt(p, size-100); err != nil || string(p) != "far" {
		t.Fatalf("read %q, %v", p, err)
	}
	if s := r.Stats(); s.PulledBytes > 64<<20 {
		t.Fatalf("%d bytes were transferred", s.PulledBytes)
	}
	if err := r.Trim(0, 1<<36); err != nil {
		t.Fatal(err)
	}
	if err := r.Push(deadline(t)); err != nil {
		t.Fatal(err)
	}
}

func TestResidentReadAllocatesNothing(t *testing.T) {
	const size = 4 << 20
	for _, mode := range []PullMode{PullFull, PullDemand} {
		remote, _ := mem.New(size)
		local, _ := mem.New(size)
		if _, err := remote.WriteAt(pattern(size, 1), 0); err != nil {
			t.Fatal(err)
		}
		r := open2(t, remote, local, Options{Pull: mode})
		p := make([]byte, 1<<20)
		if _, err := r.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if mode == PullFull {
			if err := r.Pull(deadline(t)); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "at rest", func() bool { return r.Stats().Fetching == 0 })
		if n := testing.AllocsPerRun(100, func() {
			if _, err := r.ReadAt(p[:4096], 4096); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Fatalf("%v: %v allocations", mode, n)
		}
	}
}

// TestResidentReadTakesNoLock reads what is local while somebody else holds the
// region's lock.
func TestResidentReadTakesNoLock(t *testing.T) {
	const size = 4 << 20
	for _, mode := range []PullMode{PullFull, PullDemand} {
		remote, _ := mem.New(size)
		local, _ := mem.New(size)
		r := open2(t, remote, local, Options{Pull: mode})
		p := make([]byte, pageSize)
		if _, err := r.ReadAt(p, pageSize); err != nil {
			t.Fatal(err)
		}
		if mode == PullFull {
			if err := r.Pull(deadline(t)); err != nil {
				t.Fatal(err)
			}
		}
		done := make(chan error, 1)
		r.mu.Lock()
		go func() {
			_, err := r.ReadAt(p, pageSize)
			done <- err
		}()
		var err error
		select {
		case err = <-done:
		case <-deadline(t).Done():
			err = context.DeadlineExceeded
		}
		r.mu.Unlock()
		if err != nil {
			t.Fatalf("%v: %v", mode, err)
		}
	}
}

func BenchmarkReadResident(b *testing.B) {
	const size = 64 << 20
	remote, _ := mem.New(size)
	local, _ := mem.New(size)
	if _, err := remote.WriteAt(pattern(size, 1), 0); err != nil {
		b.Fatal(err)
	}
	r := open2(b, remote, local, Options{})
	if err := r.Pull(deadline(b)); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int64{4 << 10, 1 << 20} {
		b.Run(memferrySize(n), func(b *testing.B) {
			p := make([]byte, n)
			b.SetBytes(n)
			for i := int64(0); b.Loop(); i++ {
				if _, err := r.ReadAt(p, i*n*7%(size-n)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func memferrySize(n int64) string {
	if n >= 1<<20 {
		return "1M"
	}
	return "4K"
}
