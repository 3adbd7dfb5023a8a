package fuse

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

// memory is a backend over a mapped memfd, with faults and delays on request.
// Wrap it to hide capabilities.
type memory struct {
	file *os.File
	mem  []byte

	views  atomic.Int64 // outstanding
	viewed atomic.Int64 // ever
	reads  atomic.Int64
	writes atomic.Int64
	syncs  atomic.Int64

	mu     sync.Mutex
	fail   error // of every operation
	data   map[int64]bool
	closed bool
}

func newMemory(size int64) (*memory, error) {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "memfd")
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return &memory{file: f, mem: mem, data: map[int64]bool{}}, nil
}

func (m *memory) setError(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

func (m *memory) err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fail
}

func (m *memory) mark(off, n int64, data bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := off / memferry.PageSize; p*memferry.PageSize < off+n; p++ {
		m.data[p] = data
	}
}

func (m *memory) Size() int64 { return int64(len(m.mem)) }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.reads.Add(1)
	if err := m.err(); err != nil {
		return 0, err
	}
	n, err := memferry.CheckRead(off, len(p), m.Size())
	copy(p[:n], m.mem[off:])
	return n, err
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.writes.Add(1)
	if err := m.err(); err != nil {
		return 0, err
	}
	if err := memferry.CheckRange("write", off, int64(len(p)), m.Size()); err != nil {
		return 0, err
	}
	m.mark(off, int64(len(p)), true)
	return copy(m.mem[off:], p), nil
}

func (m *memory) WriteZeroes(off, n int64, _ memferry.ZeroFlags) error {
	if err := memferry.CheckRange("zero", off, n, m.Size()); err != nil {
		return err
	}
	clear(m.mem[off : off+n])
	m.mark(off, n, false)
	return m.err()
}

func (m *memory) Extents(_ context.Context, off, n int64) ([]memferry.Extent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []memferry.Extent
	for end := off + n; off < end && len(out) < 8; {
		page := off / memferry.PageSize
		e := memferry.Extent{Off: off, Len: min((page+1)*memferry.PageSize, end) - off}
		if !m.data[page] {
			e.Flags = memferry.ExtentHole | memferry.ExtentZero
		}
		out = append(out, e)
		off += e.Len
	}
	return out, nil
}

func (m *memory) Sync() error {
	m.syncs.Add(1)
	return m.err()
}

func (m *memory) Close() error {
	if m.closed {
		return nil
	}
	m.closed = true
	return errors.Join(unix.Munmap(m.mem), m.file.Close())
}

// viewer adds zero-copy reads.
type viewer struct{ *memory }

func (v viewer) View(off, n int64) ([]byte, error) {
	if err := v.err(); err != nil {
		return nil, err
	}
	v.views.Add(1)
	v.viewed.Add(1)
	return v.mem[off : off+n], nil
}
func (v viewer) ViewForWrite(off, n int64) ([]byte, error) { return v.View(off, n) }
func (v viewer) ReleaseView()                              { v.views.Add(-1) }

// filer adds the file, and can't be written.
type filer struct{ *memory }

func (f filer) File() *os.File { return f.file }
func (f filer) ReadOnly() bool { return true }

// pulled looks like a region: views and file are there once complete.
type pulled struct {
	*memory
	complete atomic.Bool
}

func (p *pulled) ReadOnly() bool           { return true }
func (p *pulled) Complete() bool           { return p.complete.Load() }
func (p *pulled) Resident(_, _ int64) bool { return p.complete.Load() }
func (p *pulled) LocalFile() *os.File      { return p.file }
func (p *pulled) View(off, n int64) ([]byte, bool) {
	if !p.complete.Load() {
		return nil, false
	}
	p.views.Add(1)
	p.viewed.Add(1)
	return p.mem[off : off+n], true
}
func (p *pulled) ReleaseView() { p.views.Add(-1) }

// slow holds reads of one page until it is let go or the context is done.
type slow struct {
	*memory
	page     int64
	held     chan struct{} // receives one for each read held
	release  chan struct{}
	canceled chan struct{} // receives one for each read cancelled
}

func newSlow(m *memory, page int64) *slow {
	return &slow{memory: m, page: page, held: make(chan struct{}, 100), release: make(chan struct{}), canceled: make(chan struct{}, 100)}
}

func (s *slow) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	at := s.page * memferry.PageSize
	if off <= at && at < off+int64(len(p)) {
		s.held <- struct{}{}
		select {
		case <-s.release:
		case <-ctx.Done():
			s.canceled <- struct{}{}
			return 0, ctx.Err()
		}
	}
	return s.ReadAt(p, off)
}
