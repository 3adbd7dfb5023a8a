package chunked

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// memory is a store in a map.
type memory struct {
	mu     sync.Mutex
	chunks map[int64][]byte
	puts   int
	hook   func(ctx context.Context, op string, index int64) error // nil: nothing
}

func (m *memory) call(ctx context.Context, op string, index int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if m.hook != nil {
		return m.hook(ctx, op, index)
	}
	return nil
}

func (m *memory) Get(ctx context.Context, index int64, p []byte) (int, error) {
	if err := m.call(ctx, "get", index); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c, ok := m.chunks[index]
	if ok && len(c) != len(p) {
		return len(c), nil
	}
	return copy(p, c), nil
}

func (m *memory) Put(ctx context.Context, index int64, p []byte) error {
	if err := m.call(ctx, "put", index); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.chunks[index] = bytes.Clone(p)
	m.puts++
	return nil
}

func (m *memory) Delete(ctx context.Context, index int64) error {
	if err := m.call(ctx, "delete", index); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.chunks, index)
	return nil
}

// finding is a memory that can do the rest.
type finding struct{ *memory }

func (f finding) GetRange(ctx context.Context, index, off int64, p []byte) (int, error) {
	if err := f.call(ctx, "get range", index); err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c, ok := f.chunks[index]
	if !ok {
		return 0, nil
	}
	return copy(p, c[off:]), nil
}

// Find looks at three chunks at a time, to exercise going on.
func (f finding) Find(_ context.Context, index, end int64) (int64, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := index; i < min(index+3, end); i++ {
		if _, ok := f.chunks[i]; ok {
			return i, true, nil
		}
	}
	return min(index+3, end), false, nil
}

func newMemory() *memory { return &memory{chunks: map[int64][]byte{}} }

func TestContract(t *testing.T) {
	const size = 1<<20 + 123
	plain := func() Store { return newMemory() }
	finds := func() Store { return finding{newMemory()} }
	for name, tc := range map[string]struct {
		store func() Store
		chunk int64
	}{
		"small chunks":   {finds, 4 << 10},
		"some chunks":    {plain, 64 << 10},
		"a single chunk": {finds, 4 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, func(t testing.TB) memferry.Backend {
				b, err := New(tc.store(), size, tc.chunk, Options{})
				if err != nil {
					t.Fatal(err)
				}
				return b
			}, backendtest.Options{Steps: 15})
		})
	}
	t.Run("read-only", func(t *testing.T) {
		backendtest.Run(t, func(t testing.TB) memferry.Backend {
			b, err := New(newMemory(), size, 64<<10, Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			return b
		}, backendtest.Options{})
	})
}

func TestNewErrors(t *testing.T) {
	for _, tc := range []struct {
		size, chunk int64
		o           Options
	}{
		{-1, 4096, Options{}},
		{memferry.MaxSize + 1, 4096, Options{}},
		{1, 2048, Options{}},
		{1, 5000, Options{}},
		{1, MaxChunkSize * 2, Options{}},
		{1, 4096, Options{Parallel: -1}},
		{1, 4096, Options{Parallel: MaxParallel + 1}},
	} {
		if _, err := New(newMemory(), tc.size, tc.chunk, tc.o); err == nil {
			t.Errorf("New(%d, %d, %+v): no error", tc.size, tc.chunk, tc.o)
		}
	}
}

func open(t *testing.T, s Store, size, chunk int64) *Backend {
	t.Helper()
	b, err := New(s, size, chunk, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// The tail chunk is as long as what it holds; zeroed chunks are deleted, and
// zeroes in holes make none.
func TestChunks(t *testing.T) {
	const chunk = 4096
	m := newMemory()
	b := open(t, finding{m}, 3*chunk+5, chunk)
	for _, w := range []struct{ off, n int64 }{{1, 2}, {2*chunk - 1, 2}, {3 * chunk, 5}} {
		if _, err := b.WriteAt(bytes.Repeat([]byte{1}, int(w.n)), w.off); err != nil {
			t.Fatal(err)
		}
	}
	lengths := func() map[int64]int {
		l := map[int64]int{}
		for i, c := range m.chunks {
			l[i] = len(c)
		}
		return l
	}
	if want := map[int64]int{0: chunk, 1: chunk, 2: chunk, 3: 5}; !maps.Equal(lengths(), want) {
		t.Errorf("chunks %v, want %v", lengths(), want)
	}
	if err := b.Trim(1, 2*chunk); err != nil { // the rest of 0 and 2 is zero already
		t.Fatal(err)
	}
	if want := map[int64]int{3: 5}; !maps.Equal(lengths(), want) {
		t.Errorf("chunks after a trim %v, want %v", lengths(), want)
	}
	if err := b.WriteZeroes(10, 2*chunk, 0); err != nil {
		t.Fatal(err)
	}
	if want := []int64{3}; !slices.Equal(slices.Collect(maps.Keys(m.chunks)), want) {
		t.Errorf("zeroes in a hole made chunks: %v", lengths())
	}
	const hole = memferry.ExtentHole | memferry.ExtentZero
	want := []memferry.Extent{{Off: 7, Len: 3*chunk - 7, Flags: hole}, {Off: 3 * chunk, Len: 5}}
	got, err := b.Extents(t.Context(), 7, 3*chunk-2)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if err := b.WriteZeroes(0, chunk+1, memferry.ZeroNoHole); err != nil {
		t.Fatal(err)
	}
	if want := map[int64]int{0: chunk, 1: chunk, 3: 5}; !maps.Equal(lengths(), want) {
		t.Errorf("chunks after zeroes that shall stay %v, want %v", lengths(), want)
	}
}

// A store's error arrives, with what came before the chunk that failed.
func TestErrors(t *testing.T) {
	const chunk = 4096
	bad := errors.New("bad sector")
	m := newMemory()
	b := open(t, m, 10*chunk, chunk)
	m.hook = func(_ context.Context, _ string, index int64) error {
		if index == 6 {
			return bad
		}
		return nil
	}
	p := make([]byte, 10*chunk)
	n, err := b.ReadAt(p, 0)
	if !errors.Is(err, bad) || n > 6*chunk || n%chunk != 0 {
		t.Errorf("read: %d, %v", n, err)
	}
	if n, err := b.WriteAt(p, 1); !errors.Is(err, memferry.ErrOutOfRange) || n != 0 {
		t.Errorf("write: %d, %v", n, err)
	}
	if _, err := b.WriteAt(p, 0); !errors.Is(err, bad) {
		t.Errorf("write: %v", err)
	}
	if err := b.Trim(0, 10*chunk); !errors.Is(err, bad) {
		t.Errorf("trim: %v", err)
	}
	if _, err := b.ReadAt(p[:chunk], 5*chunk); err != nil {
		t.Errorf("read of another chunk: %v", err)
	}
}

// A chunk of the wrong length is no data.
func TestWrongLength(t *testing.T) {
	m := newMemory()
	b := open(t, m, 3*4096, 4096)
	m.chunks[1] = make([]byte, 5)
	for _, r := range [][2]int64{{4096, 4096}, {4100, 5}, {0, 3 * 4096}} {
		if _, err := b.ReadAt(make([]byte, r[1]), r[0]); !errors.Is(err, memferry.ErrCorrupt) {
			t.Errorf("read of %d at %d: %v, want ErrCorrupt", r[1], r[0], err)
		}
	}
}

// Close ends calls that a store keeps waiting, and those that wait for them.
func TestCloseUnblocks(t *testing.T) {
	m := newMemory()
	entered := make(chan struct{}, 8)
	m.hook = func(ctx context.Context, _ string, _ int64) error {
		entered <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	b := open(t, m, 10*4096, 4096)
	errs := make(chan error)
	for range 2 { // the same chunk: one waits for the lock
		go func() {
			_, err := b.WriteAt([]byte{1}, 5)
			errs <- err
		}()
	}
	go func() {
		_, err := b.ReadAt(make([]byte, 2*4096), 0)
		errs <- err
	}()
	<-entered
	<-entered
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	for range 3 {
		if err := <-errs; !errors.Is(err, memferry.ErrClosed) {
			t.Errorf("%v, want ErrClosed", err)
		}
	}
}

// A context ends its own call alone.
func TestContext(t *testing.T) {
	m := newMemory()
	ctx, cancel := context.WithCancel(t.Context())
	m.hook = func(ctx context.Context, op string, _ int64) error {
		if op == "get" {
			cancel()
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	b := open(t, m, 10*4096, 4096)
	if _, err := b.ReadAtContext(ctx, make([]byte, 10*4096), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	if _, err := b.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
}

func TestRefusedWrite(t *testing.T) {
	refused := errors.New("not now")
	m := newMemory()
	b, err := New(m, 4096, 4096, Options{BeforeWrite: func() error { return refused }})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.WriteAt([]byte{1}, 0); !errors.Is(err, refused) || m.puts != 0 {
		t.Errorf("%v, %d puts", err, m.puts)
	}
}
