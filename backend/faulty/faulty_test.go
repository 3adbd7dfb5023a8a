package faulty

import (
	"bytes"
	"context"
	"errors"
	"io"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const size = 1<<20 + 123

func memory(t testing.TB) memferry.Backend {
	t.Helper()
	b, err := mem.New(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func TestContract(t *testing.T) {
	for name, wrap := range map[string]func(memferry.Backend) memferry.Backend{
		"without faults": func(b memferry.Backend) memferry.Backend { return New(b, Options{}) },
		"with delays": func(b memferry.Backend) memferry.Backend {
			return New(b, Options{Rules: []Rule{{When: Chance(0.01), Fault: Fault{Delay: 10 * time.Microsecond}}}})
		},
		"volatile": func(b memferry.Backend) memferry.Backend { return NewVolatile(b) },
	} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, func(t testing.TB) memferry.Backend { return wrap(memory(t)) }, backendtest.Options{Steps: 5})
		})
	}
}

func TestFaults(t *testing.T) {
	p := []byte("0123456789")
	for _, tc := range []struct {
		name  string
		fault Fault
		n     int
		err   error
		holds string // afterwards
	}{
		{"error", Fault{Err: syscall.EIO}, 0, syscall.EIO, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"lost answer", Fault{Err: syscall.EIO, Done: true}, 0, syscall.EIO, "0123456789"},
		{"short", Fault{Short: 4}, 4, io.ErrUnexpectedEOF, "0123\x00\x00\x00\x00\x00\x00"},
		{"short, error", Fault{Short: 4, Err: syscall.ENOSPC}, 4, syscall.ENOSPC, "0123\x00\x00\x00\x00\x00\x00"},
		{"lost", Fault{Lose: true}, 10, nil, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"nothing", Fault{}, 10, nil, "0123456789"},
	} {
		f := New(memory(t), Options{Rules: []Rule{{When: Kinds(Write), Fault: tc.fault}}})
		n, err := f.WriteAt(p, 5)
		if n != tc.n || !errors.Is(err, tc.err) {
			t.Errorf("%s: write: %d, %v; want %d, %v", tc.name, n, err, tc.n, tc.err)
		}
		got := make([]byte, len(p))
		if _, err := f.ReadAt(got, 5); err != nil || string(got) != tc.holds {
			t.Errorf("%s: then read %q, %v; want %q", tc.name, got, err, tc.holds)
		}
		if f.Injected() != 1 || f.Ops(Write) != 1 || f.Ops(Read) != 1 {
			t.Errorf("%s: %d faults, %d writes, %d reads", tc.name, f.Injected(), f.Ops(Write), f.Ops(Read))
		}
		_ = f.Close()
	}
}

func TestPredicates(t *testing.T) {
	read := func(off, n int64) Op { return Op{Kind: Read, Off: off, Len: n, Roll: 0.5} }
	for name, tc := range map[string]struct {
		p    Predicate
		want string // for five times the same read
	}{
		"always":  {Always(), "11111"},
		"not":     {Not(Always()), "00000"},
		"kinds":   {Kinds(Sync, Read), "11111"},
		"others":  {Kinds(Sync, Write), "00000"},
		"range":   {Range(109, 1), "11111"},
		"before":  {Range(0, 100), "00000"},
		"behind":  {Range(110, 1), "00000"},
		"first":   {First(2, Always()), "11000"},
		"after":   {After(2, Always()), "00111"},
		"every":   {Every(2, Always()), "01010"},
		"and":     {And(After(1, Always()), First(2, Always())), "01100"},
		"or":      {Or(First(1, Always()), After(3, Always())), "10001"},
		"likely":  {Chance(0.6), "11111"},
		"seldom":  {Chance(0.4), "00000"},
		"nothing": {And(), "11111"},
	} {
		var got bytes.Buffer
		for range 5 {
			if tc.p(read(100, 10)) {
				got.WriteByte('1')
			} else {
				got.WriteByte('0')
			}
		}
		if got.String() != tc.want {
			t.Errorf("%s: %s, want %s", name, got.String(), tc.want)
		}
	}
}

// The same seed makes the same faults.
func TestSeed(t *testing.T) {
	run := func(seed uint64) string {
		f := New(memory(t), Options{Seed: seed, Rules: []Rule{{When: Chance(0.3), Fault: Fault{Err: syscall.EIO}}}})
		defer f.Close()
		var got bytes.Buffer
		for range 100 {
			if _, err := f.ReadAt(make([]byte, 1), 0); err != nil {
				got.WriteByte('1')
			} else {
				got.WriteByte('0')
			}
		}
		return got.String()
	}
	if a, b := run(1), run(1); a != b {
		t.Errorf("one seed, two sequences:\n%s\n%s", a, b)
	}
	if a, b := run(1), run(2); a == b {
		t.Errorf("two seeds, one sequence: %s", a)
	}
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := New(memory(t), Options{Rules: []Rule{{When: Always(), Fault: Fault{Delay: time.Hour}}}})
		start := time.Now()
		if err := f.Sync(); err != nil || time.Since(start) != time.Hour {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := f.ReadAtContext(ctx, make([]byte, 1), 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
		f.SetRules(Rule{When: Always(), Fault: Fault{Hang: true}})
		hung := make(chan error)
		go func() { hung <- f.Sync() }()
		time.Sleep(1000 * time.Hour)
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if err := <-hung; !errors.Is(err, memferry.ErrClosed) {
			t.Errorf("hung sync: %v", err)
		}
	})
}

func TestVolatile(t *testing.T) {
	v := NewVolatile(memory(t))
	defer v.Close()
	write := func(off int64, s string) {
		t.Helper()
		if _, err := v.WriteAt([]byte(s), off); err != nil {
			t.Fatal(err)
		}
	}
	read := func(off int64) string {
		t.Helper()
		p := make([]byte, 3)
		if _, err := v.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		return string(p)
	}
	write(0, "old")
	write(size-3, "end")
	if err := v.Sync(); err != nil {
		t.Fatal(err)
	}
	write(0, "new")
	write(memferry.PageSize, "two")
	if got := read(0); got != "new" || v.Unsynced() != 2 {
		t.Errorf("before the crash: %q, %d pages", got, v.Unsynced())
	}
	if err := v.Crash(func(off int64) bool { return off == memferry.PageSize }); err != nil {
		t.Fatal(err)
	}
	if got := read(0) + read(memferry.PageSize) + read(size-3); got != "oldtwoend" || v.Unsynced() != 0 {
		t.Errorf("after the crash: %q, %d pages", got, v.Unsynced())
	}
}
