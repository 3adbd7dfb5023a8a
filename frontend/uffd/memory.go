package uffd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
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
	state mapping // what has landed; see landing
	fd    *uffd.FD

	engine  engine
	tracks  bool     // writes are to be tracked
	tracker *tracker // nil where they are not

	syncing sync.Mutex      // held while writes are being handed over, or pages dropped
	moving  sync.RWMutex    // held by who copies bytes that must not be dropped meanwhile
	drops   atomic.Int64    // how often pages were dropped; changes under moving
	states  []atomic.Uint32 // of the pages; see landing

	gate      gate.Gate
	closeOnce sync.Once
	closeErr  error
}

// engine serves the faults of a memory, here or in a helper.
type engine interface {
	// pull waits until everything is here.
	pull(ctx context.Context) error
	// sync hands written pages to the source.
	sync(b Bitmap) error
	// invalidate drops pages, nothing of which is to be handed over.
	invalidate(ctx context.Context, off, n int64) error
	stats() (region.Stats, error)
	// readOnly reports whether the source refuses writes.
	readOnly() bool
	// close closes the source and ends serving.
	close() error
}

// Open makes source available as memory, served by this process: read the
// package's section on deadlocks. It takes ownership of source, which Close
// closes, or Open itself when it fails.
//
// It needs Linux 5.14, and 6.7 where what is written has to reach the source:
// with neither Options.ReadOnly nor a source that is read-only. Where something
// is missing, the error is memferry.ErrNotSupported.
func Open(ctx context.Context, source memferry.Backend, o Options) (*Memory, error) {
	m, f, err := open(o, source.Size(), memferry.CapabilitiesOf(source).ReadOnly)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("uffd: %w", err), source.Close())
	}
	f.close()
	land := m.landing()
	land.zap = m.zap
	l, err := newLocal(ctx, source, land, m.o) // which closes the source if it fails
	if err != nil {
		return nil, errors.Join(fmt.Errorf("uffd: %w", err), m.release())
	}
	m.engine = l
	return m, nil
}

// landing is for the server of the memory in this process.
func (m *Memory) landing() *landing {
	l := newLanding(m.fd, address(m.app.data), m.plain.data, m.state.data, m.size)
	if m.tracker != nil {
		l.tables = m.tracker.scanner
	}
	return l
}

// files are what a helper needs to serve a memory.
type files struct{ data, state *os.File }

func (f files) close() {
	for _, f := range []*os.File{f.data, f.state} {
		if f != nil {
			f.Close() // the mappings keep it
		}
	}
}

// open makes the memory, with nobody serving it. Of a source that refuses
// writes, what is written stays here.
func open(o Options, n int64, refuses bool) (*Memory, files, error) {
	var f files
	if err := o.validate(); err != nil {
		return nil, f, err
	}
	if n <= 0 || n > math.MaxInt-hugeSize-pageSize {
		return nil, f, fmt.Errorf("source of %s can't be memory: %w", size.Format(n), memferry.ErrOutOfRange)
	}
	m := &Memory{size: n, o: o}
	err := canTrack()
	m.tracks = err == nil && !o.ReadOnly
	if err != nil && !o.ReadOnly && !refuses {
		// Nobody would ever know what was written, and it would be lost.
		return nil, f, fmt.Errorf("writes to the memory can't be found: %w; open it with Options.ReadOnly", err)
	}
	if err := m.build(&f); err != nil {
		f.close()
		return nil, f, errors.Join(err, m.release())
	}
	return m, f, nil
}

func (m *Memory) build(f *files) error {
	features, err := choose(m.tracks)
	if err != nil {
		return err
	}
	if m.fd, err = uffd.Open(features); err != nil {
		return err
	}
	n := roundUp(m.size)
	if f.data, err = newFile(n, !m.o.SmallPages); err != nil {
		return err
	}
	if f.state, err = newFile(stateSize(m.size), false); err != nil {
		return err
	}
	if m.plain, err = mapFile(f.data, n, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	if m.state, err = mapFile(f.state, stateSize(m.size), unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	m.states = states(m.state.data, n/pageSize)
	return m.register(*f, features, n)
}

// register makes the application's mapping, and has its faults reported.
func (m *Memory) register(f files, features uffd.Feature, n int64) (err error) {
	prot := unix.PROT_READ | unix.PROT_WRITE
	if m.o.ReadOnly {
		prot = unix.PROT_READ
	}
	if m.app, err = mapFile(f.data, n, prot); err != nil {
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
		m.tracker, err = newTracker(m.app.data, m.states)
	}
	return err
}

// choose returns the features to open with.
func choose(track bool) (uffd.Feature, error) {
	if n := os.Getpagesize(); n != pageSize {
		return 0, fmt.Errorf("pages of %s: %w", size.Format(int64(n)), memferry.ErrNotSupported)
	}
	have, err := uffd.Available()
	if err != nil {
		return 0, err
	}
	if err := uffd.Have(needed); err != nil {
		return 0, err
	}
	features := needed | have&wanted
	if track {
		features |= tracking
	}
	return features, nil
}

// canTrack tells why writes can't be tracked, if so.
var canTrack = func() error {
	if err := uffd.Have(tracking); err != nil {
		return err
	}
	return uffd.HaveScan()
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
	// The other mapping has no faults that anybody would have to serve.
	err := m.move(off, int64(n), unix.MADV_POPULATE_READ, func() { copy(p[:n], m.plain.data[off:]) })
	if err != nil {
		return 0, err
	}
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
	// In the application's mapping, where writes are seen.
	err := m.move(off, int64(len(p)), unix.MADV_POPULATE_WRITE, func() { copy(m.app.data[off:], p) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// move has bytes copied that are present and not dropped meanwhile.
func (m *Memory) move(off, n int64, advice int, move func()) error {
	for {
		drops := m.drops.Load()
		if err := m.populate(off, n, advice); err != nil {
			return err
		}
		m.moving.RLock()
		same := m.drops.Load() == drops
		if same {
			move()
		}
		m.moving.RUnlock()
		if same {
			return nil
		}
	}
}

// Wait waits until everything is here, and makes it come if Options.Pull does
// not. From then on, unless Invalidate drops some of them again, the bytes can
// be used without restraint, but for pages of zeroes, which Populate makes.
func (m *Memory) Wait(ctx context.Context) error {
	if !m.gate.Enter() {
		return fmt.Errorf("uffd: wait: %w", memferry.ErrClosed)
	}
	defer m.gate.Leave()
	if err := m.engine.pull(ctx); err != nil {
		return fmt.Errorf("uffd: %w", err)
	}
	return nil
}

// Stats returns a snapshot of the region behind the memory.
func (m *Memory) Stats() (region.Stats, error) {
	if !m.gate.Enter() {
		return region.Stats{}, fmt.Errorf("uffd: stats: %w", memferry.ErrClosed)
	}
	defer m.gate.Leave()
	return m.engine.stats()
}

// Close hands what was written to the source, as Sync does, ends the memory,
// and closes the source. Nobody may use the bytes any more. It is idempotent.
func (m *Memory) Close() error {
	m.closeOnce.Do(func() { m.closeErr = m.close() })
	return m.closeErr
}

func (m *Memory) close() error {
	var errs []error
	if m.tracker != nil && !m.engine.readOnly() {
		errs = append(errs, m.Sync())
	}
	m.gate.Shut()
	errs = append(errs, m.engine.close(), m.unblock())
	<-m.gate.Idle()
	return errors.Join(append(errs, m.release())...)
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
	return errors.Join(append(errs, m.app.close(), m.plain.close(), m.state.close())...)
}
