package region

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/memferry/memferry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// op is one call of a fake remote.
type op struct {
	kind   string // read, write, zero, sync, extents
	class  memferry.Class
	off, n int64
}

// fakeRemote is memory with a gate in front. hook, if set, is called without
// locks before each operation and decides its fate.
type fakeRemote struct {
	mu     sync.Mutex
	data   []byte
	synced []byte // what a lost Sync goes back to
	ops    []op
	busy   map[int64]string // pages with a write in flight
	bad    error            // first broken rule
	hook   func(ctx context.Context, o op) error
	tag    int
	closed chan struct{}
	once   sync.Once

	loseSync func() bool // true: Sync fails, and what was not synced is gone
	piece    int64       // size of pieces of a stream; 0: no streams
	holes    bool        // knows extents
	tags     bool        // has generations
	skew     bool        // pieces are out of order and not page-aligned
	fences   bool        // can end other sessions
	rnd      *rand.Rand

	session  string
	inFlight map[*lateWrite]struct{}
	late     []*lateWrite // of sessions whose process was killed
}

// lateWrite is a write that may be carried out after the end of who made it.
type lateWrite struct {
	session string
	off, n  int64
	p       []byte // nil: zeroes
}

func newRemote(data []byte) *fakeRemote {
	return &fakeRemote{
		data: data, synced: slices.Clone(data), busy: map[int64]string{}, inFlight: map[*lateWrite]struct{}{},
		closed: make(chan struct{}), piece: 64 << 10, session: newSession(),
	}
}

var sessions atomic.Int64

func newSession() string { return fmt.Sprint("session ", sessions.Add(1)) }

func (f *fakeRemote) Capabilities() memferry.Capabilities {
	c := memferry.Capabilities{ContextReader: f, ContextWriter: f, ZeroWriter: f}
	if f.piece > 0 {
		c.StreamReader = f
	}
	if f.holes {
		c.Extenter = f
	}
	if f.tags {
		c.Generationer = f
	}
	if f.fences {
		c.Fencer = f
	}
	return c
}

func (f *fakeRemote) Session() string { return f.session }

// Fence carries some of the session's writes out, and drops the others.
func (f *fakeRemote) Fence(ctx context.Context, session string) error {
	if err := f.begin(ctx, op{kind: "fence"}); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.landLocked(func(w *lateWrite) bool { return w.session == session })
	return nil
}

// landLocked decides the fate of late writes: carried out or never.
func (f *fakeRemote) landLocked(which func(*lateWrite) bool) {
	f.late = slices.DeleteFunc(f.late, func(w *lateWrite) bool {
		if !which(w) {
			return false
		}
		if f.rnd == nil || f.rnd.IntN(2) == 0 {
			f.applyLocked(w)
		}
		return true
	})
}

// surprise carries out what nobody has fenced, right after something else.
func (f *fakeRemote) surprise() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.landLocked(func(*lateWrite) bool { return true })
}

func (f *fakeRemote) applyLocked(w *lateWrite) {
	if w.p == nil {
		clear(f.data[w.off : w.off+w.n])
	} else {
		copy(f.data[w.off:], w.p)
	}
	f.tag++
}

func (f *fakeRemote) begin(ctx context.Context, o op) error {
	f.mu.Lock()
	f.ops = append(f.ops, o)
	hook := f.hook
	f.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, o); err != nil {
			return err
		}
	}
	select {
	case <-f.closed:
		return memferry.ErrClosed
	default:
		return ctx.Err()
	}
}

func (f *fakeRemote) setHook(h func(ctx context.Context, o op) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = h
}

func (f *fakeRemote) calls(kind string) []op {
	f.mu.Lock()
	defer f.mu.Unlock()
	var os []op
	for _, o := range f.ops {
		if o.kind == kind {
			os = append(os, o)
		}
	}
	return os
}

func (f *fakeRemote) bytes() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.data)
}

func (f *fakeRemote) Size() int64 { return int64(len(f.data)) }

func (f *fakeRemote) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

func (f *fakeRemote) ReadAt(p []byte, off int64) (int, error) {
	return f.ReadAtContext(context.Background(), p, off)
}

func (f *fakeRemote) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := f.begin(ctx, op{"read", memferry.ClassOf(ctx), off, int64(len(p))}); err != nil {
		return 0, err
	}
	defer f.surprise()
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := memferry.CheckRead(off, len(p), f.Size())
	copy(p, f.data[off:off+int64(n)])
	return n, err
}

func (f *fakeRemote) ReadStream(ctx context.Context, off, n int64, sink func(off, n int64, p []byte) error) error {
	if err := f.begin(ctx, op{"read", memferry.ClassOf(ctx), off, n}); err != nil {
		return err
	}
	if err := memferry.CheckRange("read", off, n, f.Size()); err != nil {
		return err
	}
	type part struct{ off, n int64 }
	var parts []part
	for at := off; at < off+n; {
		k := min(f.piece, off+n-at)
		if f.skew {
			f.mu.Lock()
			k = min(1+f.rnd.Int64N(f.piece), off+n-at)
			f.mu.Unlock()
		}
		parts = append(parts, part{at, k})
		at += k
	}
	if f.skew {
		f.mu.Lock()
		f.rnd.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
		f.mu.Unlock()
	}
	for _, q := range parts {
		f.mu.Lock()
		p := slices.Clone(f.data[q.off : q.off+q.n])
		f.mu.Unlock()
		if f.skew && !slices.ContainsFunc(p, func(b byte) bool { return b != 0 }) {
			p = nil
		}
		if err := sink(q.off, q.n, p); err != nil {
			return err
		}
		clear(p) // it was valid during the call only
	}
	return nil
}

func (f *fakeRemote) WriteAt(p []byte, off int64) (int, error) {
	return f.WriteAtContext(context.Background(), p, off)
}

func (f *fakeRemote) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := f.write(ctx, "write", off, int64(len(p)), p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (f *fakeRemote) WriteZeroes(off, n int64, _ memferry.ZeroFlags) error {
	return f.write(context.Background(), "zero", off, n, nil)
}

func (f *fakeRemote) write(ctx context.Context, kind string, off, n int64, p []byte) error {
	if err := memferry.CheckRange("write", off, n, f.Size()); err != nil {
		return err
	}
	f.mark(off, n, kind)
	defer f.unmark(off, n)
	w := &lateWrite{session: f.session, off: off, n: n, p: slices.Clone(p)}
	f.mu.Lock()
	f.inFlight[w] = struct{}{}
	f.mu.Unlock()
	defer f.surprise()
	err := f.begin(ctx, op{kind, memferry.ClassOf(ctx), off, n})
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.inFlight, w)
	if err == nil {
		f.applyLocked(w)
	}
	return err
}

// mark notes that pages are being written, and that no two writes of one page
// ever are at once.
func (f *fakeRemote) mark(off, n int64, kind string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	page, pages := pagesOf(off, n)
	for p := page; p < page+pages; p++ {
		if other := f.busy[p]; other != "" && f.bad == nil {
			f.bad = fmt.Errorf("%s of page %d while a %s of it is in flight", kind, p, other)
		}
		f.busy[p] = kind
	}
}

func (f *fakeRemote) unmark(off, n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	page, pages := pagesOf(off, n)
	for p := page; p < page+pages; p++ {
		delete(f.busy, p)
	}
}

func (f *fakeRemote) Sync() error {
	if err := f.begin(context.Background(), op{kind: "sync"}); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.loseSync != nil && f.loseSync() {
		copy(f.data, f.synced)
		return errors.New("writes may be lost")
	}
	copy(f.synced, f.data)
	return nil
}

func (f *fakeRemote) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	if err := f.begin(ctx, op{"extents", memferry.ClassOf(ctx), off, n}); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return zeroExtents(f.data, off, n), nil
}

// zeroExtents finds runs of zero pages.
func zeroExtents(data []byte, off, n int64) []memferry.Extent {
	var es []memferry.Extent
	for at := off; at < off+n && len(es) < 64; {
		k := min((at/pageSize+1)*pageSize, off+n) - at
		var flags memferry.ExtentFlags
		if !slices.ContainsFunc(data[at:at+k], func(b byte) bool { return b != 0 }) {
			flags = memferry.ExtentZero | memferry.ExtentHole
		}
		if last := len(es) - 1; last >= 0 && es[last].Flags == flags {
			es[last].Len += k
		} else {
			es = append(es, memferry.Extent{Off: at, Len: k, Flags: flags})
		}
		at += k
	}
	return es
}

func (f *fakeRemote) Generation(ctx context.Context) (string, error) {
	if err := f.begin(ctx, op{kind: "generation", class: memferry.ClassOf(ctx)}); err != nil {
		return "", err
	}
	defer f.surprise()
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Sprint("g", f.tag), nil
}

// fakeLocal is memory whose writes can be refused, and that can outlive the
// region that closes it.
type fakeLocal struct {
	mu    sync.Mutex
	data  []byte
	full  bool
	holes bool
	dead  bool // the process that used it was killed
}

func newLocal(size int64) *fakeLocal {
	// What is absent must never be read: it is not zero either.
	d := make([]byte, size)
	for i := range d {
		d[i] = 0xEE
	}
	return &fakeLocal{data: d}
}

func (l *fakeLocal) Capabilities() memferry.Capabilities {
	c := memferry.Capabilities{ZeroWriter: l}
	if l.holes {
		c.Extenter = l
	}
	return c
}

func (l *fakeLocal) Size() int64  { return int64(len(l.data)) }
func (l *fakeLocal) Sync() error  { time.Sleep(time.Millisecond); return nil }
func (l *fakeLocal) Close() error { return nil }

func (l *fakeLocal) setFull(v bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.full = v
}

func (l *fakeLocal) ReadAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := memferry.CheckRead(off, len(p), l.Size())
	copy(p, l.data[off:off+int64(n)])
	return n, err
}

func (l *fakeLocal) WriteAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return 0, memferry.ErrClosed
	}
	if l.full {
		copy(l.data[off:], p[:len(p)/2])
		return len(p) / 2, memferry.ErrNoSpace
	}
	copy(l.data[off:], p)
	return len(p), nil
}

func (l *fakeLocal) WriteZeroes(off, n int64, _ memferry.ZeroFlags) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return memferry.ErrClosed
	}
	clear(l.data[off : off+n])
	return nil
}

func (l *fakeLocal) Extents(_ context.Context, off, n int64) ([]memferry.Extent, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return zeroExtents(l.data, off, n), nil
}

// fakeStore remembers as a Store must. A crash loses what was not committed,
// but not intents; kill makes it deaf, as the end of a process does.
type fakeStore struct {
	mu      sync.Mutex
	state   []PageState
	gen     string
	pushing bool
	session string
	dead    bool
	failing bool
	full    bool // no room for intents
	commits int
}

func (s *fakeStore) Load(fn func(page, n int64, dirty bool) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p, st := range s.state {
		if st == Absent {
			continue
		}
		if err := fn(int64(p), 1, st == Dirty); err != nil {
			return err
		}
	}
	return nil
}

var errKilled = errors.New("killed")

func (s *fakeStore) Intend(page, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return errKilled
	}
	if s.full {
		return memferry.ErrNoSpace
	}
	for p := page; p < page+n; p++ {
		if s.state[p] == Present {
			s.state[p] = Dirty
		}
	}
	return nil
}

func (s *fakeStore) Commit(cs []Change) error {
	time.Sleep(time.Millisecond)       // a window for writes before it counts,
	defer time.Sleep(time.Millisecond) // and one after
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return errKilled
	}
	if s.failing {
		return memferry.ErrNoSpace
	}
	s.commits++
	for _, c := range cs {
		for p := c.Page; p < c.Page+c.N; p++ {
			s.state[p] = c.State
		}
	}
	return nil
}

func (s *fakeStore) Generation() (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gen, s.pushing
}

func (s *fakeStore) RemoteSession() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.session
}

func (s *fakeStore) SetRemoteSession(session string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return errKilled
	}
	s.session = session
	return nil
}

func (s *fakeStore) SetGeneration(gen string, pushing bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return errKilled
	}
	s.gen, s.pushing = gen, pushing
	return nil
}

func (s *fakeStore) Close() error { return nil }

// pattern fills n bytes that differ from page to page and are never zero.
func pattern(n int64, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	p := make([]byte, n)
	for i := 0; i < len(p); i += 8 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], r.Uint64()|0x0101010101010101)
		copy(p[i:], w[:])
	}
	return p
}

// open opens a region that is closed with the test.
func open2(t testing.TB, remote, local memferry.Backend, o Options) *Region {
	t.Helper()
	r, err := Open(context.Background(), remote, local, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// deadline returns a context that catches hangs.
func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until cond holds; it only fails to catch hangs.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}
