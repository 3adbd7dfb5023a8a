package uffd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/backend/faulty"
	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/region"
)

// Every test here shares its process with the server of the faults. They reach
// absent memory by system calls, and by loads and stores of single words.

func source(t testing.TB, content []byte) *mem.Backend {
	t.Helper()
	b, err := mem.New(int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func noise(t testing.TB, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	r := testenv.Rand(t)
	for i := 0; i+8 <= n; i += 8 {
		binary.NativeEndian.PutUint64(p[i:], r.Uint64())
	}
	return p
}

func memory(t testing.TB, b memferry.Backend, o Options) *Memory {
	t.Helper()
	m, err := Open(context.Background(), b, o)
	if errors.Is(err, memferry.ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func stats(t testing.TB, m *Memory) region.Stats {
	t.Helper()
	s, err := m.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func tracked(t testing.TB, m *Memory) {
	t.Helper()
	if m.tracker == nil {
		_, err := m.Dirty()
		t.Skip(err)
	}
}

// TestContract: memory keeps the contract of a backend, reached by calls.
func TestContract(t *testing.T) {
	for _, mode := range []region.PullMode{region.PullFull, region.PullNone} {
		t.Run(mode.String(), func(t *testing.T) {
			backendtest.Run(t, func(t testing.TB) memferry.Backend {
				b, err := mem.New(1<<20 + 300)
				if err != nil {
					t.Fatal(err)
				}
				m, err := Open(context.Background(), b, Options{Pull: mode, IOTimeout: time.Minute})
				if errors.Is(err, memferry.ErrNotSupported) {
					t.Skip(err)
				}
				if err != nil {
					t.Fatal(err)
				}
				return m
			}, backendtest.Options{Steps: 10})
		})
	}
}

// TestBytes: every byte is right, touched in any order, while the rest arrives.
func TestBytes(t *testing.T) {
	for _, mode := range []region.PullMode{region.PullFull, region.PullDemand, region.PullNone} {
		for _, small := range []bool{false, true} {
			t.Run(mode.String(), func(t *testing.T) {
				want := noise(t, 6<<20+300)
				clear(want[1<<20 : 3<<20])
				m := memory(t, source(t, want), Options{Pull: mode, SmallPages: small, ReadOnly: true})
				got := m.Bytes()
				for range 500 {
					i := rand.IntN(len(got))
					if got[i] != want[i] {
						t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
					}
				}
				if err := m.Populate(0, m.Size()); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Fatal("the memory differs from its source")
				}
			})
		}
	}
}

// TestZeroes: what the source knows to be zero takes no memory until touched.
func TestZeroes(t *testing.T) {
	const n = 64 << 30
	b, err := mem.New(n)
	if err != nil {
		t.Fatal(err)
	}
	m := memory(t, b, Options{})
	if err := m.Wait(testenv.Deadline(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < n; i += n / 8 {
		if m.Bytes()[i] != 0 {
			t.Fatalf("byte %d is not zero", i)
		}
	}
	// A few requests may leave before the source was asked where its data is.
	if s := stats(t, m); s.PulledBytes > n/64 {
		t.Errorf("%d bytes were pulled", s.PulledBytes)
	}
}

// TestSystemCalls: write(2) from and read(2) into absent pages.
func TestSystemCalls(t *testing.T) {
	want := noise(t, 1<<20)
	m := memory(t, source(t, want), Options{Pull: region.PullNone})
	if m.fd.UserModeOnly() {
		t.Skip("faults in system calls are not reported to this user")
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const half = 1 << 19
	if _, err := f.Write(m.Bytes()[:half]); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(m.Bytes()[half+100:half+200], 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, half)
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want[:half]) {
		t.Error("write(2) took other bytes")
	}
	copy(want[half+100:half+200], want)
	got = make([]byte, len(want))
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("read(2) left other bytes")
	}
}

// load reads a byte, and tells where the kernel says that it can't be had.
func load(m *Memory, off int64) (b byte, failed bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { failed = recover() != nil }()
	return m.Bytes()[off], false
}

// TestFailingSource: pages that can't be had fail, and only they; they heal.
func TestFailingSource(t *testing.T) {
	want := noise(t, 1<<20)
	const bad, good = 256 << 10, 768 << 10
	broken := errors.New("broken")
	rule := faulty.Rule{When: faulty.And(faulty.Kinds(faulty.Read), faulty.Range(bad, 64<<10)), Fault: faulty.Fault{Err: broken}}
	f := faulty.New(source(t, want), faulty.Options{Rules: []faulty.Rule{rule}})
	m := memory(t, f, Options{Pull: region.PullNone, ChunkSize: 64 << 10, IOTimeout: 100 * time.Millisecond})
	if m.fd.Features()&wanted == 0 {
		t.Skip("this kernel can't poison pages")
	}
	if _, failed := load(m, bad); !failed {
		t.Error("a load of a page that can't be had succeeded")
	}
	if err := m.Populate(bad+pageSize, pageSize); !errors.Is(err, memferry.ErrTimeout) {
		t.Errorf("populate: %v", err)
	}
	if b, failed := load(m, good); failed || b != want[good] {
		t.Errorf("another page: %#x, %v", b, failed)
	}
	f.SetRules()
	if err := m.Wait(testenv.Deadline(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after the source healed: %v, the same bytes: %v", err, bytes.Equal(got, want))
	}
	if b, failed := load(m, bad); failed || b != want[bad] {
		t.Errorf("the healed page: %#x, %v", b, failed)
	}
}

// TestFailsOnce: a failure that passes before the deadline is not noticed.
func TestFailsOnce(t *testing.T) {
	want := noise(t, 1<<20)
	rule := faulty.Rule{When: faulty.First(3, faulty.Kinds(faulty.Read)), Fault: faulty.Fault{Err: io.ErrUnexpectedEOF}}
	m := memory(t, faulty.New(source(t, want), faulty.Options{Rules: []faulty.Rule{rule}}), Options{Pull: region.PullNone, IOTimeout: time.Minute})
	got := make([]byte, len(want))
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v, the same bytes: %v", err, bytes.Equal(got, want))
	}
}

// TestCloseUnblocks: a read that waits for a source that never answers.
func TestCloseUnblocks(t *testing.T) {
	rule := faulty.Rule{When: faulty.Kinds(faulty.Read), Fault: faulty.Fault{Hang: true}}
	m := memory(t, faulty.New(source(t, noise(t, 1<<20)), faulty.Options{Rules: []faulty.Rule{rule}}), Options{IOTimeout: time.Hour})
	done := make(chan error, 1)
	go func() {
		_, err := m.ReadAt(make([]byte, 100), 5000)
		done <- err
	}()
	for stats(t, m).DemandWaits == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("the read: %v", err)
	}
}

// TestDirty: exactly the pages that were written to, once, and none that
// arrived meanwhile.
func TestDirty(t *testing.T) {
	want := noise(t, 8<<20)
	m := memory(t, source(t, want), Options{})
	tracked(t, m)
	if err := m.Populate(0, 4<<20); err != nil {
		t.Fatal(err)
	}
	if err := m.Wait(testenv.Deadline(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	expect := func(pages ...int64) {
		t.Helper()
		b, err := m.Dirty()
		if err != nil {
			t.Fatal(err)
		}
		var got []int64
		_ = b.Runs(func(page, n int64) error {
			for i := range n {
				got = append(got, page+i)
			}
			return nil
		})
		if len(got) != len(pages) || b.Count() != int64(len(pages)) {
			t.Fatalf("dirty pages: %v, want %v", got, pages)
		}
		for i, p := range pages {
			if got[i] != p || !b.Has(p) {
				t.Fatalf("dirty pages: %v, want %v", got, pages)
			}
		}
	}
	expect()
	m.Bytes()[5*pageSize]++
	m.Bytes()[6*pageSize+1]++
	if _, err := m.WriteAt([]byte{1}, 2000*pageSize); err != nil {
		t.Fatal(err)
	}
	expect(5, 6, 2000)
	expect()
	m.Bytes()[6*pageSize]++
	expect(6)
}

// TestSync: the source gets what was written, by loads and stores and by calls.
func TestSync(t *testing.T) {
	want := noise(t, 4<<20+100)
	b := source(t, want)
	m := memory(t, b, Options{})
	tracked(t, m)
	for i := range 200 {
		off := rand.IntN(len(want))
		want[off] = byte(i)
		m.Bytes()[off] = byte(i)
	}
	want[len(want)-1] = 42
	m.Bytes()[len(want)-1] = 42
	if _, err := m.Dirty(); err != nil { // Sync has a memory of its own
		t.Fatal(err)
	}
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := b.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the source differs from the memory")
	}
	if s := stats(t, m); s.PushedBytes > 201*s.ChunkSize {
		t.Errorf("%d bytes were pushed", s.PushedBytes)
	}
}

// TestNoWriteMissed: writers count in words of random pages while Dirty is
// drained, and a copy is kept up to date from its answers alone.
func TestNoWriteMissed(t *testing.T) {
	const n = 4 << 20
	rounds := 3000
	if testing.Short() {
		rounds = 500
	}
	want := noise(t, n)
	m := memory(t, source(t, want), Options{ChunkSize: 64 << 10})
	tracked(t, m)
	replica := bytes.Clone(want)
	var stop atomic.Bool
	var writes atomic.Int64
	var wg sync.WaitGroup
	seed := uint64(testenv.Seed(t))
	for w := range 3 {
		rng := rand.New(rand.NewPCG(seed, uint64(w)))
		wg.Go(func() {
			words := words(m.Bytes())
			for !stop.Load() {
				words[rng.IntN(len(words)/4)*4+w].Add(1)
				writes.Add(1)
			}
		})
	}
	drain := func() {
		b, err := m.Dirty()
		if err != nil {
			t.Error(err)
			return
		}
		_ = b.Runs(func(page, n int64) error {
			copy(replica[page*pageSize:(page+n)*pageSize], m.plain.data[page*pageSize:])
			return nil
		})
	}
	deadline := testenv.Deadline(t, time.Minute)
	for i := range rounds {
		for writes.Load() < int64(i) && deadline.Err() == nil {
			runtime.Gosched()
		}
		drain()
	}
	stop.Store(true)
	wg.Wait()
	drain()
	if err := m.Populate(0, n); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(replica, m.Bytes()) {
		t.Error("the replica missed a write")
	}
	if bytes.Equal(replica, want) || writes.Load() < int64(rounds) {
		t.Errorf("%d writes in %d rounds", writes.Load(), rounds)
	}
}

// TestUnmapPart: unmapping a part doesn't disturb the rest.
func TestUnmapPart(t *testing.T) {
	want := noise(t, 2<<20)
	m := memory(t, source(t, want), Options{Pull: region.PullDemand})
	hole := m.app.data[1<<20 : 1<<20+64<<10]
	if _, err := unix.MmapPtr(-1, 0, pointer(hole), uintptr(len(hole)), unix.PROT_READ,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
	for off := range want {
		if off%pageSize == 0 && (off < 1<<20 || off >= 1<<20+len(hole)) && m.Bytes()[off] != want[off] {
			t.Fatalf("byte %d differs", off)
		}
	}
}
