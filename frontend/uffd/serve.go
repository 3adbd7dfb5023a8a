package uffd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/sys/uffd"
)

const (
	// maxFaults bounds the faults of one process that are served at once; others
	// wait in the kernel.
	maxFaults = 256
	// eventPause is how long to wait for an event that is in the way of a copy
	// to be read.
	eventPause = 50 * time.Microsecond
	// populatePause is how soon to look again for what has just arrived.
	populatePause = 20 * time.Millisecond
)

// errGone is why a session ended: the process has.
var errGone = errors.New("the process is gone")

// session serves the memory of one process.
type session struct {
	src    *Source
	fd     *uffd.FD
	maps   []*mapped // in the order of their addresses
	chunk  int64
	stop   int // an eventfd that ends run
	ctx    context.Context
	cancel context.CancelFunc
	more   chan struct{} // something arrived

	// order: whoever reads messages holds it alone, and notes what was removed
	// before it lets go; whoever installs pages shares it. As soon as a message is
	// read its process goes on and removes the pages: without that, a copy could
	// bring back after it what was there before.
	order sync.RWMutex

	faults chan struct{} // one for each that is being served
	wg     sync.WaitGroup
	active underWay   // addresses of pages
	mu     sync.Mutex // guards stop
}

// mapped is a mapping, and which of its pages are zero for good since the
// process has removed them.
type mapped struct {
	Mapping
	removed Bitmap // under session.order
}

// Serve fills the memory that a process has handed over, and takes ownership of
// the descriptor. Pages that are touched come first, a whole chunk for each;
// with region.PullFull the rest follows as it arrives.
//
// It returns nil once the process is gone. The end of ctx asks it to settle:
// it fetches and installs what is still missing, takes the memory out of
// userfaultfd's hands, so that the process can go on by itself, and returns.
// [Source.Close] ends it at once.
func (s *Source) Serve(ctx context.Context, h Handover) error {
	x, err := s.session(h)
	if err != nil {
		return fmt.Errorf("uffd: serve: %w", err)
	}
	defer x.close()
	if err := s.add(x); err != nil {
		return fmt.Errorf("uffd: serve: %w", err)
	}
	defer s.remove(x)
	pid := -1
	if h.PID > 0 {
		if pid, err = unix.PidfdOpen(h.PID, 0); err != nil {
			return fmt.Errorf("uffd: serve process %d: %w", h.PID, err)
		}
		defer unix.Close(pid) //nolint:errcheck // nothing was written
	}
	var background sync.WaitGroup
	background.Go(func() { x.populate(ctx) })
	err = x.run(pid)
	x.cancel()
	background.Wait()
	x.wg.Wait()
	if errors.Is(err, errGone) {
		return nil
	}
	return err
}

// session checks what was handed over.
func (s *Source) session(h Handover) (*session, error) {
	maps, err := h.check(s.Size())
	if err != nil {
		return nil, errors.Join(err, unix.Close(h.FD))
	}
	x := &session{
		src: s, maps: maps, chunk: s.region.Stats().ChunkSize, more: make(chan struct{}, 1),
		faults: make(chan struct{}, maxFaults),
	}
	if x.fd, err = uffd.FromFD(h.FD, 0); err != nil {
		return nil, errors.Join(err, unix.Close(h.FD))
	}
	if x.stop, err = newEvent(); err != nil {
		return nil, errors.Join(err, x.fd.Close())
	}
	x.ctx, x.cancel = context.WithCancel(context.Background())
	context.AfterFunc(x.ctx, x.end)
	return x, nil
}

// end makes run return.
func (x *session) end() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.stop >= 0 {
		_ = signalEvent(x.stop) // full is as good
	}
}

func (x *session) close() {
	x.cancel()
	x.mu.Lock()
	defer x.mu.Unlock()
	unix.Close(x.stop) //nolint:errcheck // nothing is lost
	x.stop = -1
	x.fd.Close() //nolint:errcheck // likewise
}

func (x *session) notify() {
	select {
	case x.more <- struct{}{}:
	default:
	}
}

// run reads messages until the process is gone, or the session is over.
func (x *session) run(pid int) error {
	var ms []uffd.Message
	fds := []unix.PollFd{
		{Fd: int32(x.fd.Fd()), Events: unix.POLLIN},
		{Fd: int32(x.stop), Events: unix.POLLIN},
		{Fd: int32(pid), Events: unix.POLLIN}, // a negative one is passed over
	}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("uffd: wait for page faults: %w", err)
		}
		switch {
		case fds[1].Revents != 0:
			return nil
		case fds[2].Revents != 0:
			return errGone
		}
		var err error
		if ms, err = x.receive(ms[:0]); err != nil {
			return err
		}
		for _, m := range ms {
			if m.Event == uffd.EventPagefault {
				x.dispatch(m.Addr)
			}
		}
	}
}

// receive reads messages, and notes the removals among them.
func (x *session) receive(ms []uffd.Message) ([]uffd.Message, error) {
	x.order.Lock()
	defer x.order.Unlock()
	ms, err := x.fd.Read(ms)
	if errors.Is(err, uffd.ErrMessage) {
		x.src.log.Warn("unexpected userfaultfd message", "error", err)
	} else if err != nil {
		return ms, fmt.Errorf("uffd: %w", err)
	}
	for _, m := range ms {
		switch m.Event {
		case uffd.EventRemove, uffd.EventUnmap:
			x.removeLocked(m.Addr, m.Addr+m.Len)
		case uffd.EventFork:
			unix.Close(m.FD) //nolint:errcheck // the child's memory is not served
			x.src.log.Warn("a process whose memory is served has forked: the child's page faults are not served")
		case uffd.EventRemap:
			x.src.log.Warn("memory that is served was moved, and is no longer", "from", m.Addr, "bytes", m.Len)
		}
	}
	return ms, nil
}

func (x *session) removeLocked(start, end uint64) {
	for _, m := range x.maps {
		from, to := max(start, m.Addr), min(end, m.end())
		if from < to {
			first := int64(from-m.Addr) / m.PageSize
			m.removed.set(first, (int64(to-m.Addr)+m.PageSize-1)/m.PageSize-first)
		}
	}
}

// find returns the mapping of an address.
func (x *session) find(addr uint64) *mapped {
	i, found := slices.BinarySearchFunc(x.maps, addr, func(m *mapped, a uint64) int {
		switch {
		case a < m.Addr:
			return 1
		case a >= m.end():
			return -1
		}
		return 0
	})
	if !found {
		return nil
	}
	return x.maps[i]
}

// dispatch begins to serve a fault, unless that of the same page is being
// served.
func (x *session) dispatch(addr uint64) {
	m := x.find(addr)
	if m == nil {
		x.src.log.Warn("page fault outside of the mappings", "address", fmt.Sprintf("%#x", addr))
		return
	}
	addr -= (addr - m.Addr) % uint64(m.PageSize)
	if !x.active.begin(addr) {
		return
	}
	select {
	case x.faults <- struct{}{}:
	case <-x.ctx.Done():
		return
	}
	x.wg.Go(func() {
		x.serve(m, int64(addr-m.Addr))
		x.active.end(addr)
		// Who was reported while we served it tries again.
		x.check(x.fd.Wake(uintptr(addr), uintptr(m.PageSize)))
		<-x.faults
	})
}

// check ends the session when the process is gone.
func (x *session) check(err error) {
	if errors.Is(err, unix.ESRCH) {
		x.cancel()
	}
}

// serve makes the page at an offset of a mapping present, or fail.
func (x *session) serve(m *mapped, at int64) {
	for x.ctx.Err() == nil {
		err := x.fault(m, at)
		if err == nil || errors.Is(err, errGone) || x.ctx.Err() != nil {
			return
		}
		x.src.log.Error("a page can't be had", "offset", m.Offset+at, "error", err)
		_, err = x.fd.Poison(uintptr(m.Addr)+uintptr(at), uintptr(m.PageSize), 0)
		if err == nil || errors.Is(err, unix.EEXIST) {
			return
		}
		select { // it can't be made to fail: it waits for the source
		case <-time.After(retryPause):
		case <-x.ctx.Done():
		}
	}
}

func (x *session) fault(m *mapped, at int64) error {
	if x.removed(m, at) {
		return x.zero(m, at)
	}
	off := m.Offset + at
	ctx := memferry.WithClass(x.ctx, memferry.ClassDemand)
	n := min(m.PageSize, x.src.Size()-off)
	if m.PageSize == pageSize {
		n = min(n, 1) // which brings all of it
	}
	if n > 0 {
		b, _ := hugeBuffers.Get().(*[hugeSize]byte)
		_, err := x.src.region.ReadAtContext(ctx, b[:n], off)
		hugeBuffers.Put(b)
		if err != nil {
			return err
		}
	}
	from, to := x.around(m, at)
	return x.install(m, from, to)
}

// hugeBuffers take what is read of a page to have it fetched.
var hugeBuffers = sync.Pool{New: func() any { return new([hugeSize]byte) }}

// around returns the part of the mapping to install for a page: its chunk, if
// all of that is here.
func (x *session) around(m *mapped, at int64) (from, to int64) {
	first := (m.Offset + at) / x.chunk * x.chunk
	from = (max(0, first-m.Offset) + m.PageSize - 1) / m.PageSize * m.PageSize
	to = min(m.Size, (first+x.chunk-m.Offset)/m.PageSize*m.PageSize)
	if from <= at && at < to && x.here(m, from, to) {
		return from, to
	}
	return at, at + m.PageSize
}

// here reports whether the source has these bytes locally.
func (x *session) here(m *mapped, from, to int64) bool {
	off, end := m.Offset+from, min(m.Offset+to, x.src.Size())
	return off >= end || x.src.region.Resident(off, end-off)
}

func (x *session) removed(m *mapped, at int64) bool {
	x.order.RLock()
	defer x.order.RUnlock()
	return m.removed.Has(at / m.PageSize)
}
