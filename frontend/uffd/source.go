package uffd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/region"
)

// Source fills the memory of other processes, which register it with a
// userfaultfd of their own and hand that over: virtual machines that are
// restored from a snapshot. All of them share what has arrived. Its methods
// are safe for concurrent use.
//
// It is read-only: what those processes write stays theirs.
type Source struct {
	region *region.Region
	local  *arrivals
	log    *slog.Logger

	mu       sync.Mutex
	sessions map[*session]struct{}
	closed   bool
	serving  sync.WaitGroup // of the sessions
}

// NewSource takes ownership of backend, also when it fails. Options.ReadOnly
// and SmallPages don't matter.
func NewSource(ctx context.Context, backend memferry.Backend, o Options) (*Source, error) {
	if err := o.validate(); err != nil {
		return nil, errors.Join(err, backend.Close())
	}
	s := &Source{log: o.Logger, sessions: make(map[*session]struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if s.local, err = newArrivals(backend.Size(), s.arrived); err != nil {
		return nil, errors.Join(fmt.Errorf("uffd: %w", err), backend.Close())
	}
	o.ReadOnly = true
	if s.region, err = region.Open(ctx, backend, s.local, o.region()); err != nil { // which closes both
		return nil, fmt.Errorf("uffd: %w", err)
	}
	return s, nil
}

// Size returns the size of the source, in bytes.
func (s *Source) Size() int64 { return s.region.Size() }

// Stats returns a snapshot of the region behind the source.
func (s *Source) Stats() region.Stats { return s.region.Stats() }

// arrived tells the sessions that there is more to hand on.
func (s *Source) arrived() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for x := range s.sessions {
		x.notify()
	}
}

func (s *Source) add(x *session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return memferry.ErrClosed
	}
	s.sessions[x] = struct{}{}
	s.serving.Add(1)
	return nil
}

func (s *Source) remove(x *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, x)
	s.serving.Done()
}

// Close ends all sessions, in the middle of what they do: threads that wait for
// pages then wait for ever, unless another handler has their userfaultfd. It
// closes the backend. End Serve before, by its context, to have them settled.
func (s *Source) Close() error {
	s.mu.Lock()
	s.closed = true
	for x := range s.sessions {
		x.cancel()
	}
	s.mu.Unlock()
	s.serving.Wait() // they look into the local side
	return s.region.Close()
}

// arrivals is the local side of a source's region: plain memory, outside of
// the Go heap, which takes space only where something arrived.
type arrivals struct {
	mem  []byte
	size int64
	tell func()
}

func newArrivals(n int64, tell func()) (*arrivals, error) {
	if n <= 0 || n != int64(int(n)) {
		return nil, fmt.Errorf("source of %d bytes can't be memory: %w", n, memferry.ErrOutOfRange)
	}
	mem, err := unix.Mmap(-1, 0, int(roundUp(n)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", n, err)
	}
	return &arrivals{mem: mem, size: n, tell: tell}, nil
}

func (a *arrivals) ReadAt(p []byte, off int64) (int, error) {
	n, eof := memferry.CheckRead(off, len(p), a.size)
	if n > 0 {
		copy(p[:n], a.mem[off:])
	}
	return n, eof
}

func (a *arrivals) WriteAt(p []byte, off int64) (int, error) {
	if err := memferry.CheckRange("write", off, int64(len(p)), a.size); err != nil {
		return 0, err
	}
	defer a.tell() // before the region knows; it looks again in a moment
	return copy(a.mem[off:], p), nil
}

// WriteZeroes has nothing to do: nothing was there before.
func (a *arrivals) WriteZeroes(off, n int64, _ memferry.ZeroFlags) error {
	defer a.tell()
	return memferry.CheckRange("write zeroes", off, n, a.size)
}

func (a *arrivals) Size() int64  { return a.size }
func (a *arrivals) Sync() error  { return nil }
func (a *arrivals) Close() error { return unix.Munmap(a.mem) }
