package uring

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func open(t *testing.T, entries uint32, o Options) *Ring {
	t.Helper()
	r, err := Open(entries, o)
	if errors.Is(err, memferry.ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// collect waits for n completions and returns results by UserData.
func collect(t *testing.T, r *Ring, n int) map[uint64]int32 {
	t.Helper()
	got := map[uint64]int32{}
	for len(got) < n {
		if c, ok := r.Pop(); ok {
			if _, twice := got[c.UserData]; twice {
				t.Fatalf("request %d completed twice", c.UserData)
			}
			got[c.UserData] = c.Res
		} else if err := r.Wait(nil); err != nil {
			t.Fatal(err)
		}
	}
	return got
}

func TestLayout(t *testing.T) {
	if n := unsafe.Sizeof(SQE{}); n != sqeSize {
		t.Errorf("SQE has %d bytes, want %d", n, sqeSize)
	}
	if n := unsafe.Sizeof(CQE{}); n != cqeSize {
		t.Errorf("CQE has %d bytes, want %d", n, cqeSize)
	}
	if n := unsafe.Sizeof(params{}); n != 120 {
		t.Errorf("params has %d bytes, want 120", n)
	}
	if n := unsafe.Offsetof(SQE{}.Cmd); n != 48 {
		t.Errorf("Cmd is at %d, want 48", n)
	}
}

func TestNop(t *testing.T) {
	for _, o := range []Options{{}, {SQE128: true}, {CQEntries: 64}} {
		r := open(t, 8, o)
		for round := range 100 { // around the rings several times
			for i := range 8 {
				s := r.Next()
				if s == nil {
					t.Fatalf("round %d: no room for request %d", round, i)
				}
				s.Op, s.UserData = OpNop, uint64(i)
			}
			for data, res := range collect(t, r, 8) {
				if res != 0 {
					t.Errorf("nop %d came to %d", data, res)
				}
			}
		}
	}
}

func TestSQE128TailIsCleared(t *testing.T) {
	r := open(t, 2, Options{SQE128: true})
	for range 50 {
		s, tail := r.NextCmd()
		if len(tail) != 64 || !bytes.Equal(tail, make([]byte, 64)) || s.Cmd != [16]byte{} {
			t.Fatalf("a request that is not clear: %v %v", s.Cmd, tail)
		}
		s.Op = OpNop
		s.Cmd[3] = 1
		for i := range tail {
			tail[i] = 7
		}
		collect(t, r, 1)
	}
	if _, tail := open(t, 2, Options{}).NextCmd(); tail != nil {
		t.Error("a short request with a tail")
	}
}

func TestFull(t *testing.T) {
	r := open(t, 4, Options{})
	n := 0
	for s := r.Next(); s != nil; s = r.Next() {
		s.Op, s.UserData = OpNop, uint64(n)
		if n++; n > 1000 {
			t.Fatal("room without end")
		}
	}
	if n < 4 {
		t.Errorf("room for %d, want 4", n)
	}
	collect(t, r, n)
	if r.Next() == nil {
		t.Error("no room after the requests were submitted")
	}
}

func TestReadWrite(t *testing.T) {
	r := open(t, 4, Options{})
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := bytes.Repeat([]byte("memferry"), 1000)
	got := make([]byte, len(want))
	rw := func(op Op, p []byte, off uint64, fd int) int32 {
		s := r.Next()
		s.Op, s.FD, s.Off, s.Addr, s.Len = op, int32(fd), off, uint64(uintptr(unsafe.Pointer(&p[0]))), uint32(len(p))
		s.UserData = 9
		res := collect(t, r, 1)[9]
		runtime.KeepAlive(p)
		return res
	}
	if n := rw(OpWrite, want, 4096, int(f.Fd())); int(n) != len(want) {
		t.Fatalf("write came to %d", n)
	}
	if n := rw(OpRead, got, 4096, int(f.Fd())); int(n) != len(want) || !bytes.Equal(got, want) {
		t.Fatalf("read came to %d", n)
	}
	if n := rw(OpRead, got, 1<<30, int(f.Fd())); n != 0 {
		t.Errorf("read past the end came to %d", n)
	}
	if n := rw(OpRead, got, 0, 1<<20); n != -int32(unix.EBADF) {
		t.Errorf("read of no file came to %d", n)
	}
}

func timeout(t *testing.T, r *Ring, d time.Duration, data uint64) *unix.Timespec {
	t.Helper()
	ts := new(unix.Timespec)
	*ts = unix.NsecToTimespec(int64(d))
	s := r.Next()
	s.Op, s.Addr, s.Len, s.UserData = OpTimeout, uint64(uintptr(unsafe.Pointer(ts))), 1, data
	return ts
}

func TestTimeout(t *testing.T) {
	r := open(t, 4, Options{})
	ts := timeout(t, r, time.Millisecond, 5)
	if res := collect(t, r, 1)[5]; res != -int32(unix.ETIME) {
		t.Errorf("came to %d, want -ETIME", res)
	}
	runtime.KeepAlive(ts)
}

func TestCancel(t *testing.T) {
	r := open(t, 4, Options{})
	ts := timeout(t, r, time.Hour, 5)
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	s := r.Next()
	s.Op, s.Addr, s.UserData = OpAsyncCancel, 5, 6
	got := collect(t, r, 2)
	if got[5] != -int32(unix.ECANCELED) || got[6] != 0 {
		t.Errorf("came to %v", got)
	}
	runtime.KeepAlive(ts)
}

// TestOverflow: completions that don't fit are kept.
func TestOverflow(t *testing.T) {
	r := open(t, 4, Options{CQEntries: 8})
	const n = 100
	seen := map[uint64]bool{}
	for i := range n {
		s := r.Next()
		for s == nil {
			if err := r.Submit(); err != nil {
				t.Fatal(err)
			}
			if s = r.Next(); s == nil { // the kernel wants completions collected
				if c, ok := r.Pop(); ok {
					seen[c.UserData] = true
				}
			}
		}
		s.Op, s.UserData = OpNop, uint64(i)
	}
	for len(seen) < n {
		if c, ok := r.Pop(); ok {
			seen[c.UserData] = true
		} else if err := r.Wait(nil); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWake: no wake-up is lost, however the two meet.
func TestWake(t *testing.T) {
	r := open(t, 4, Options{})
	const rounds = 2000
	var work atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range rounds {
			work.Add(1)
			r.Wake()
			for work.Load() > 0 {
				runtime.Gosched()
			}
		}
	}()
	for n := 0; n < rounds; {
		if err := r.Wait(func() bool { return work.Load() == 0 }); err != nil {
			t.Fatal(err)
		}
		if _, ok := r.Pop(); ok {
			t.Fatal("a completion of no request")
		}
		if work.Swap(0) > 0 {
			n++
		}
	}
	<-done
}

func TestCloseWhileWaiting(t *testing.T) {
	for range 50 {
		r := open(t, 4, Options{})
		ts := timeout(t, r, time.Hour, 5)
		var wg sync.WaitGroup
		result := make(chan error, 1)
		wg.Go(func() { result <- r.Wait(nil) })
		wg.Go(r.Wake)
		for range 2 {
			wg.Go(func() {
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if err := <-result; err != nil && !errors.Is(err, memferry.ErrClosed) {
			t.Errorf("Wait: %v", err)
		}
		if err := r.Wait(nil); !errors.Is(err, memferry.ErrClosed) {
			t.Errorf("Wait after Close: %v", err)
		}
		if _, ok := r.Pop(); ok || r.Next() != nil {
			t.Error("a closed ring goes on")
		}
		r.Wake()
		runtime.KeepAlive(ts)
	}
}

func TestSingleIssuer(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r := open(t, 4, Options{SingleIssuer: true})
	r.Next().UserData = 1
	collect(t, r, 1)
}

func TestOpenRefuses(t *testing.T) {
	for _, n := range []uint32{0, MaxEntries, 1 << 31} {
		if r, err := Open(n, Options{}); err == nil {
			t.Errorf("a ring of %d entries: %v", n, r.Close())
		}
	}
}
