package uffd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/gate"
	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/internal/sys/uffd"
	"github.com/memferry/memferry/region"
)

// needed are the features without which there is no memory, wanted those that
// make it better.
const (
	needed = uffd.FeatureMissingShmem | uffd.FeatureMinorShmem
	wanted = uffd.FeaturePoison
	// tracking arms pages as they arrive.
	tracking = uffd.FeaturePagefaultWP | uffd.FeatureWPShmem | uffd.FeatureWPAsync
)

// Memory is a backend as memory. Its methods are safe for concurrent use, and
// none of them can deadlock with the faults they cause.
type Memory struct {
	size  int64
	o     Options
	app   mapping // what the application sees; its faults are served
	plain mapping // the same memory, without any faults
	fd    *uffd.FD

	server   *server
	cancel   context.CancelFunc // ends what the server is doing
	served   chan struct{}      // closed when it has ended
	serveErr error              // why, once served is closed
	tracker  *tracker           // nil where writes are not tracked

	gate      gate.Gate
	closeOnce sync.Once
	closeErr  error
}

// Open makes source available as memory, served by this process: read the
// package's section on deadlocks. It takes ownership of source, which Close
// closes, or Open itself when it fails.
//
// It needs Linux 5.14; where something is missing, the error is
// memferry.ErrNotSupported.
func Open(ctx context.Context, source memferry.Backend, o Options) (*Memory, error) {
	m, err := open(o, source.Size())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("uffd: %w", err), source.Close())
	}
	if err := m.serve(ctx, source); err != nil { // which has closed the source
		return nil, errors.Join(fmt.Errorf("uffd: %w", err), m.release())
	}
	return m, nil
}

// open makes the memory, with nobody serving it.
func open(o Options, n int64) (*Memory, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if n <= 0 || n > math.MaxInt-hugeSize-pageSize {
		return nil, fmt.Errorf("source of %s can't be memory: %w", size.Format(n), memferry.ErrOutOfRange)
	}
	m := &Memory{size: n, o: o}
	if err := m.build(); err != nil {
		return nil, errors.Join(err, m.release())
	}
	return m, nil
}

func (m *Memory) build() error {
	features, err := choose(m.o.ReadOnly)
	if err != nil {
		return err
	}
	if m.fd, err = uffd.Open(features); err != nil {
		return err
	}
	n := roundUp(m.size)
	f, err := newFile(n, !m.o.SmallPages)
	if err != nil {
		return err
	}
	defer f.Close() // the mappings keep it
	if m.plain, err = mapFile(f, n, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	prot := unix.PROT_READ | unix.PROT_WRITE
	if m.o.ReadOnly {
		prot = unix.PROT_READ
	}
	if m.app, err = mapFile(f, n, prot); err != nil {
		return err
	}
	mode := uffd.ModeMissing | uffd.ModeMinor
	if features&uffd.FeatureWPAsync != 0 {
		mode |= uffd.ModeWP
	}
	if _, err = m.fd.Register(address(m.app.data), uintptr(n), mode); err != nil {
		return err
	}
	if mode&uffd.ModeWP != 0 {
		m.tracker, err = newTracker(m.app.data)
	}
	return err
}

// choose returns the features to open with.
func choose(readOnly bool) (uffd.Feature, error) {
	have, err := uffd.Available()
	if err != nil {
		return 0, err
	}
	if err := uffd.Have(needed); err != nil {
		return 0, err
	}
	features := needed | have&wanted
	if !readOnly && have&tracking == tracking && uffd.HaveScan() == nil {
		features |= tracking
	}
	return features, nil
}

// serve starts the region and the server of the faults.
func (m *Memory) serve(ctx context.Context, source memferry.Backend) error {
	land := newLanding(m.fd, address(m.app.data), m.plain.data, m.size)
	r, err := region.Open(ctx, source, land, m.o.region())
	if err != nil {
		return err
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return errors.Join(fmt.Errorf("eventfd: %w", err), r.Close())
	}
	log := m.o.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	serving, cancel := context.WithCancel(context.Background())
	m.cancel, m.served = cancel, make(chan struct{})
	m.server = &server{fd: m.fd, stop: stop, land: land, region: r, log: log, active: make(map[int64]bool)}
	go func() {
		defer close(m.served)
		m.serveErr = m.server.run(serving)
	}()
	return nil
}

// Size returns the size of the source.
func (m *Memory) Size() int64 { return m.size }

// Bytes returns the memory. It is valid until Close.
func (m *Memory) Bytes() []byte { return m.app.data[:m.size:m.size] }

// Populate makes the n bytes at off present, and waits for that.
func (m *Memory) Populate(off, n int64) error {
	if !m.gate.Enter() {
		return fmt.Errorf("uffd: populate: %w", memferry.ErrClosed)
	}
	defer m.gate.Leave()
	if err := memferry.CheckRange("populate", off, n, m.size); err != nil {
		return fmt.Errorf("uffd: %w", err)
	}
	return m.populate(off, n, unix.MADV_POPULATE_READ)
}

func (m *Memory) populate(off, n int64, advice int) error {
	if n == 0 {
		return nil
	}
	p := m.app.data[off&^(pageSize-1) : roundUp(off+n)]
	if m.fd.UserModeOnly() {
		err := m.touch(p, off)
		if m.gate.Closed() {
			return fmt.Errorf("uffd: %w", memferry.ErrClosed)
		}
		return err
	}
	for {
		err := unix.Madvise(p, advice)
		switch {
		case m.gate.Closed(): // the fault may have ended in zeroes
			return fmt.Errorf("uffd: %w", memferry.ErrClosed)
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EHWPOISON), errors.Is(err, unix.EFAULT):
			return fmt.Errorf("uffd: %d bytes at %d did not arrive: %w", n, off, memferry.ErrTimeout)
		}
		return fmt.Errorf("uffd: populate %d bytes at %d: %w", n, off, err)
	}
}

// touch loads a byte of each page: a load can be preempted. It is for kernels
// that don't report the faults of system calls to us.
func (m *Memory) touch(p []byte, off int64) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if recover() != nil {
			err = fmt.Errorf("uffd: %d bytes at %d did not arrive: %w", len(p), off, memferry.ErrTimeout)
		}
	}()
	var sum byte
	for i := 0; i < len(p); i += pageSize {
		sum |= p[i]
	}
	touched.Store(uint32(sum))
	return nil
}

// touched keeps the compiler from leaving out the loads.
var touched atomic.Uint32

// ReadAt reads, after what is absent has arrived. See memferry.Backend.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	n, eof := memferry.CheckRead(off, len(p), m.size)
	if n == 0 {
		return 0, eof
	}
	if !m.gate.Enter() {
		return 0, fmt.Errorf("uffd: read: %w", memferry.ErrClosed)
	}
	defer m.gate.Leave()
	if err := m.populate(off, int64(n), unix.MADV_POPULATE_READ); err != nil {
		return 0, err
	}
	// The other mapping has no faults that anybody would have to serve.
	copy(p[:n], m.plain.data[off:])
	return n, eof
}

// WriteAt writes, after what is absent has arrived. See memferry.Backend.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if err := memferry.CheckRange("write", off, int64(len(p)), m.size); err != nil {
		return 0, fmt.Errorf("uffd: %w", err)
	}
	if m.o.ReadOnly {
		return 0, fmt.Errorf("uffd: write: %w", memferry.ErrReadOnly)
	}
	if !m.gate.Enter() {
		return 0, fmt.Errorf("uffd: write: %w", memferry.ErrClosed)
	}
	defer m.gate.Leave()
	if err := m.populate(off, int64(len(p)), unix.MADV_POPULATE_WRITE); err != nil {
		return 0, err
	}
	// In the application's mapping, where writes are seen.
	return copy(m.app.data[off:], p), nil
}

// Wait waits until everything is here, and makes it come if Options.Pull does
// not. From then on the bytes can be used without restraint, but for pages of
// zeroes, which Populate makes.
func (m *Memory) Wait(ctx context.Context) error {
	if !m.gate.Enter() {
		return fmt.Errorf("uffd: wait: %w", memferry.ErrClosed)
	}
	defer m.gate.Leave()
	done := make(chan error, 1)
	go func() { done <- m.server.region.Pull(ctx) }()
	select {
	case err := <-done:
		return err
	case <-m.served:
		if m.serveErr != nil {
			return m.serveErr
		}
		return fmt.Errorf("uffd: wait: %w", memferry.ErrClosed)
	}
}

// Stats returns a snapshot of the region behind the memory.
func (m *Memory) Stats() region.Stats { return m.server.region.Stats() }

// Close hands what was written to the source, as Sync does, ends the memory,
// and closes the source. Nobody may use the bytes any more. It is idempotent.
func (m *Memory) Close() error {
	m.closeOnce.Do(func() { m.closeErr = m.close() })
	return m.closeErr
}

func (m *Memory) close() error {
	var errs []error
	if m.tracker != nil && !m.server.region.ReadOnly() {
		errs = append(errs, m.Sync())
	}
	m.gate.Shut()
	// This makes calls that wait for a fault return: see server.serve.
	m.cancel()
	errs = append(errs, m.server.region.Close())
	var one [8]byte
	one[0], one[7] = 1, 1 // whatever the byte order, more than zero
	if _, err := unix.Write(m.server.stop, one[:]); err != nil {
		errs = append(errs, fmt.Errorf("stop the server: %w", err))
	}
	<-m.served
	errs = append(errs, m.serveErr, m.unblock())
	<-m.gate.Idle()
	errs = append(errs, unix.Close(m.server.stop), m.release())
	return errors.Join(errs...)
}

// unblock lets calls that are waiting for pages go on.
func (m *Memory) unblock() error {
	return m.fd.Unregister(address(m.app.data), uintptr(len(m.app.data)))
}

// release gives back what build took.
func (m *Memory) release() error {
	var errs []error
	if m.tracker != nil {
		errs = append(errs, m.tracker.close())
	}
	if m.fd != nil {
		errs = append(errs, m.fd.Close())
	}
	return errors.Join(append(errs, m.app.close(), m.plain.close())...)
}
