package uffd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/faulty"
	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/region"
)

// untold tells nothing but its bytes.
type untold struct{ memferry.Backend }

// TestInvalidate: a part is fetched again, by loads and by calls, and nothing
// else; zeroes may become data, and data zeroes.
func TestInvalidate(t *testing.T) {
	for _, small := range []bool{false, true} {
		for _, readOnly := range []bool{false, true} {
			want := noise(t, 6<<20+300)
			clear(want[3<<20 : 4<<20])
			b := source(t, want)
			m := memory(t, untold{b}, Options{SmallPages: small, ReadOnly: readOnly, Pull: region.PullNone})
			if err := m.Populate(0, m.Size()); err != nil {
				t.Fatal(err)
			}
			news := noise(t, len(want))
			clear(news[4<<20 : 5<<20])
			if _, err := b.WriteAt(news, 0); err != nil {
				t.Fatal(err)
			}
			const off, n = 1<<20 + 5*pageSize, 4 << 20
			if err := m.Invalidate(t.Context(), off, n); err != nil {
				t.Fatal(err)
			}
			copy(want[off:off+n], news[off:])
			for i := off; i < off+n; i += 7 * pageSize {
				if m.Bytes()[i] != want[i] {
					t.Fatalf("byte %d is %#x, want %#x", i, m.Bytes()[i], want[i])
				}
			}
			got := make([]byte, len(want))
			if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("small %v, read-only %v: %v, the same: %v", small, readOnly, err, bytes.Equal(got, want))
			}
			if s := stats(t, m); len(s.Errors) > 0 {
				t.Errorf("errors: %+v", s.Errors)
			}
			if !readOnly {
				if d, err := m.Dirty(); err != nil || d.Count() != 0 {
					t.Errorf("%d pages are dirty (%v)", d.Count(), err)
				}
			}
		}
	}
}

// TestInvalidateKeepsWrites: what was written is in the source, and is read
// again from there.
func TestInvalidateKeepsWrites(t *testing.T) {
	want := noise(t, 4<<20)
	path := sourceFile(t, want)
	m := helped(t, "file:"+path, Options{})
	defer closed(t, m)
	tracked(t, m)
	for i := 0; i < len(want); i += 3 * pageSize {
		want[i]++
		m.Bytes()[i]++
	}
	if err := m.Invalidate(t.Context(), 0, m.Size()); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the source differs from the memory (%v)", err)
	}
	if !bytes.Equal(m.Bytes(), want) {
		t.Error("the memory has lost writes")
	}
	for _, bad := range [][2]int64{{-1, 1}, {0, m.Size() + 1}} {
		if err := m.Invalidate(t.Context(), bad[0], bad[1]); !errors.Is(err, memferry.ErrOutOfRange) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// TestInvalidatedPageFails: a page that can't be fetched again fails, as others
// do, and heals.
func TestInvalidatedPageFails(t *testing.T) {
	want := noise(t, 1<<20)
	f := faulty.New(source(t, want), faulty.Options{})
	m := memory(t, f, Options{Pull: region.PullNone, IOTimeout: 100 * time.Millisecond})
	if m.fd.Features()&wanted == 0 {
		t.Skip("this kernel can't poison pages")
	}
	if err := m.Populate(0, m.Size()); err != nil {
		t.Fatal(err)
	}
	f.SetRules(faulty.Rule{When: faulty.Kinds(faulty.Read), Fault: faulty.Fault{Err: io.ErrUnexpectedEOF}})
	if err := m.Invalidate(t.Context(), 0, m.Size()); err != nil {
		t.Fatal(err)
	}
	if _, failed := load(m, 5*pageSize); !failed {
		t.Error("a page that can't be had was read")
	}
	if err := m.Sync(); err != nil { // of nothing: poison is no write
		t.Fatal(err)
	}
	if s := stats(t, m); s.PushedBytes != 0 {
		t.Errorf("%d bytes were pushed", s.PushedBytes)
	}
	f.SetRules()
	if err := m.Wait(testenv.Deadline(t, hang)); err != nil {
		t.Fatal(err)
	}
	if b, failed := load(m, 5*pageSize); failed || b != want[5*pageSize] {
		t.Errorf("the healed page: %#x, failed %v", b, failed)
	}
}

// TestInvalidateAmongWriters: writers count, readers copy, while pages are
// dropped and handed over: no count is lost.
func TestInvalidateAmongWriters(t *testing.T) {
	want := make([]byte, 4<<20)
	t.Run("process", func(t *testing.T) {
		if testenv.Race {
			t.Skip("the race detector does atomic operations where they can't be preempted: see the section on deadlocks")
		}
		b := source(t, want)
		m := memory(t, b, Options{ChunkSize: 64 << 10})
		amongWriters(t, m, nil)
		got, here := make([]byte, len(want)), make([]byte, len(want))
		_, err := b.ReadAt(got, 0)
		if _, err2 := m.ReadAt(here, 0); err != nil || err2 != nil || !bytes.Equal(got, here) {
			t.Errorf("the source differs (%v, %v)", err, err2)
		}
	})
	t.Run("helper", func(t *testing.T) {
		path := sourceFile(t, want)
		m := helped(t, "file:"+path, Options{ChunkSize: 64 << 10})
		defer closed(t, m)
		amongWriters(t, m, func(words []atomic.Uint64) {
			p := make([]byte, 256<<10)
			copy(p, m.Bytes()[rand.IntN(len(words)*8-len(p)):]) // a fault within the runtime
		})
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, m.Bytes()) {
			t.Errorf("the source differs (%v)", err)
		}
	})
}

func amongWriters(t *testing.T, m *Memory, use func([]atomic.Uint64)) {
	tracked(t, m)
	rounds := 150
	if testing.Short() {
		rounds = 30
	}
	words := words(m.Bytes())
	counts := make([]uint64, len(words)) // each writer has words of its own
	var stop atomic.Bool
	var wg sync.WaitGroup
	for w := range 3 {
		rng := rand.New(rand.NewPCG(uint64(testenv.Seed(t)), uint64(w)))
		wg.Go(func() {
			for !stop.Load() {
				i := rng.IntN(len(words)/4)*4 + w
				if got := words[i].Add(1); got != counts[i]+1 {
					t.Errorf("word %d is %d, want %d", i, got, counts[i]+1)
					stop.Store(true)
				}
				counts[i]++
			}
		})
	}
	if use != nil {
		for range runtime.GOMAXPROCS(0) {
			wg.Go(func() {
				for !stop.Load() {
					use(words)
				}
			})
		}
	}
	rng := rand.New(rand.NewPCG(uint64(testenv.Seed(t)), 9))
	ctx := testenv.Deadline(t, 2*time.Minute)
	p := make([]byte, 100<<10)
	for range rounds {
		off := rng.Int64N(m.Size())
		var err error
		switch rng.IntN(4) {
		case 0:
			err = m.Sync()
		case 1:
			_, err = m.ReadAt(p, min(off, m.Size()-int64(len(p))))
		default:
			err = m.Invalidate(ctx, off, 1+rng.Int64N(m.Size()-off))
		}
		if err != nil {
			t.Error(err)
			break
		}
	}
	stop.Store(true)
	wg.Wait()
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := m.Invalidate(context.Background(), 0, m.Size()); err != nil {
		t.Fatal(err)
	}
	var total uint64
	for i := range words {
		if got := words[i].Load(); got != counts[i] {
			t.Fatalf("word %d is %d in the end, want %d", i, got, counts[i])
		}
		total += counts[i]
	}
	if total < uint64(rounds) {
		t.Errorf("%d writes in %d rounds", total, rounds)
	}
}
