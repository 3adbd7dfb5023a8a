// Package uring is the kernel's io_uring interface, as far as memferry's block
// devices need it, without cgo: one thread that submits requests and collects
// their completions, and others that may wake it.
//
// The kernel's own description is in io_uring(7), io_uring_setup(2) and
// io_uring_enter(2).
package uring

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

// MaxEntries bounds a ring (IORING_MAX_ENTRIES).
const MaxEntries = 32768

// wakeData is the UserData of the ring's own request.
const wakeData = ^uint64(0)

// wakeSink is where every ring reads its wake-ups to, and nobody looks. It is
// no part of a ring because the kernel may still write to it after Close.
var wakeSink [8]byte

// Options adjust a ring. The zero value works.
type Options struct {
	// CQEntries is the room for completions; 0 means twice the requests. What
	// does not fit the kernel keeps until it does.
	CQEntries uint32
	// SQE128 doubles the size of requests, for commands whose argument is
	// longer than 16 bytes.
	SQE128 bool
	// SingleIssuer promises that the OS thread that calls Open is the only one
	// to submit.
	SingleIssuer bool
}

var errClosed = fmt.Errorf("io_uring: %w", memferry.ErrClosed)

// Ring is a pair of queues shared with the kernel. One goroutine at a time may
// use it; Wake and Close are for any.
type Ring struct {
	fd     int
	wakeMu sync.RWMutex // wakeFD is not closed while somebody writes to it
	wakeFD int          // -1 once closed

	ringMem, sqeMem []byte

	sqHead, sqTail, sqFlags *uint32 // shared with the kernel
	cqHead, cqTail          *uint32
	cqes                    []CQE
	sqMask, cqMask          uint32
	stride                  uintptr

	tail   uint32 // of what Next has handed out
	toSend uint32 // requests handed out and not submitted
	armed  bool   // the read of wakeFD is under way

	// asleep is set while Wait may be in the kernel, so that Wake knows whether
	// a system call is needed.
	asleep atomic.Bool
	closed atomic.Bool
	// use is held by whoever is in a method that touches the rings.
	use       sync.Mutex
	closeOnce sync.Once
	closeErr  error
}

// Open makes a ring with room for entries requests that are not submitted yet
// (rounded up to a power of two, at most MaxEntries). Where the kernel has no
// io_uring, or keeps it from this process, the error is
// memferry.ErrNotSupported and says so.
func Open(entries uint32, o Options) (*Ring, error) {
	if entries == 0 || entries > MaxEntries-1 {
		return nil, fmt.Errorf("io_uring: %d entries: want 1 to %d", entries, MaxEntries-1)
	}
	p, fd, err := setup(entries+1, o) // one more, for the wake-up
	if err != nil {
		return nil, err
	}
	r := &Ring{fd: fd, wakeFD: -1, stride: sqeSize}
	if o.SQE128 {
		r.stride = sqe128Size
	}
	if err := r.mmap(p); err != nil {
		return nil, errors.Join(err, r.release())
	}
	// Not O_NONBLOCK: io_uring would not wait then.
	if r.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		r.wakeFD = -1
		return nil, errors.Join(fmt.Errorf("eventfd: %w", err), r.release())
	}
	return r, nil
}

func setup(entries uint32, o Options) (*params, int, error) {
	must := uint32(0)
	if o.SQE128 {
		must |= setupSQE128
	}
	if o.CQEntries > 0 {
		must |= setupCQSize
	}
	wish := uint32(setupCoopTaskrun)
	if o.SingleIssuer {
		wish |= setupSingleIssuer
	}
	// What only makes it faster is left out on older kernels.
	for _, flags := range []uint32{must | wish, must | setupCoopTaskrun, must} {
		p := &params{flags: flags, cqEntries: o.CQEntries}
		fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(p)), 0)
		switch {
		case errno == 0 && p.features&(featSingleMmap|featNoDrop) != featSingleMmap|featNoDrop:
			unix.Close(int(fd)) //nolint:errcheck // nothing was done with it
			return nil, -1, fmt.Errorf("io_uring needs Linux 5.5: %w; update the kernel", memferry.ErrNotSupported)
		case errno == 0:
			return p, int(fd), nil
		case errno != unix.EINVAL:
			return nil, -1, setupError(errno)
		}
	}
	return nil, -1, setupError(unix.EINVAL)
}

func setupError(errno unix.Errno) error {
	switch errno {
	case unix.ENOSYS:
		return fmt.Errorf("this kernel is built without io_uring: %w (%w)", memferry.ErrNotSupported, errno)
	case unix.EPERM, unix.EACCES:
		return fmt.Errorf("io_uring is forbidden here: %w (%w); see `sysctl kernel.io_uring_disabled` and the container's seccomp profile",
			memferry.ErrNotSupported, errno)
	case unix.ENOMEM:
		return fmt.Errorf("io_uring: %w; raise the limit of locked memory (ulimit -l)", errno)
	}
	return fmt.Errorf("io_uring_setup: %w", errno)
}

// mmap maps the rings. Those of requests and completions are one mapping.
func (r *Ring) mmap(p *params) error {
	n := max(p.sqOff.array+p.sqEntries*4, p.cqOff.cqes+p.cqEntries*cqeSize)
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	var err error
	if r.ringMem, err = unix.Mmap(r.fd, offSQRing, int(n), prot, flags); err != nil {
		return fmt.Errorf("io_uring: map the rings: %w", err)
	}
	if r.sqeMem, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries)*int(r.stride), prot, flags); err != nil {
		return fmt.Errorf("io_uring: map the requests: %w", err)
	}
	at := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.ringMem[off])) }
	r.sqHead, r.sqTail, r.sqFlags = at(p.sqOff.head), at(p.sqOff.tail), at(p.sqOff.flags)
	r.cqHead, r.cqTail = at(p.cqOff.head), at(p.cqOff.tail)
	r.sqMask, r.cqMask = *at(p.sqOff.ringMask), *at(p.cqOff.ringMask)
	r.cqes = unsafe.Slice((*CQE)(unsafe.Pointer(&r.ringMem[p.cqOff.cqes])), p.cqEntries)
	// The slots are used in turn, so the indirection can stay as it is.
	for i, array := uint32(0), unsafe.Slice(at(p.sqOff.array), p.sqEntries); i < p.sqEntries; i++ {
		array[i] = i
	}
	r.tail = atomic.LoadUint32(r.sqTail)
	return nil
}

// FD is the ring's descriptor, for messages only.
func (r *Ring) FD() int { return r.fd }

// Next returns a cleared request to fill in, or nil when as many as the ring
// has room for wait to be submitted. It is submitted by the next Wait.
func (r *Ring) Next() *SQE {
	sqe, _ := r.NextCmd()
	return sqe
}

// NextCmd is Next for commands. tail are the 64 bytes that follow SQE.Cmd; nil
// without Options.SQE128. It must be filled in before the ring is used again.
func (r *Ring) NextCmd() (sqe *SQE, tail []byte) {
	r.use.Lock()
	defer r.use.Unlock()
	if r.closed.Load() || r.toSend >= r.sqMask {
		return nil, nil // one slot is kept for the wake-up
	}
	return r.next()
}

func (r *Ring) next() (*SQE, []byte) {
	slot := unsafe.Pointer(&r.sqeMem[uintptr(r.tail&r.sqMask)*r.stride])
	clear(unsafe.Slice((*byte)(slot), r.stride))
	r.tail++
	r.toSend++
	if r.stride == sqeSize {
		return (*SQE)(slot), nil
	}
	return (*SQE)(slot), unsafe.Slice((*byte)(unsafe.Add(slot, sqeSize)), sqe128Size-sqeSize)
}

// Submit hands over the requests without waiting for any.
func (r *Ring) Submit() error { return r.enter(0, nil) }

// Wait submits the requests, and returns when a completion is there, or after
// Wake. idle, if any, is asked once Wake is sure to be noticed: with false Wait
// does not sleep. It fails with memferry.ErrClosed once the ring is closed.
func (r *Ring) Wait(idle func() bool) error { return r.enter(1, idle) }

func (r *Ring) enter(least uint32, idle func() bool) error {
	r.use.Lock()
	defer r.use.Unlock()
	if r.closed.Load() {
		return errClosed
	}
	if least > 0 {
		r.asleep.Store(true)
		defer r.asleep.Store(false)
		if !r.armed {
			sqe, _ := r.next()
			sqe.Op, sqe.FD, sqe.Off, sqe.UserData = OpRead, int32(r.wakeFD), ^uint64(0), wakeData
			sqe.Addr, sqe.Len = uint64(uintptr(unsafe.Pointer(&wakeSink))), uint32(len(wakeSink))
			r.armed = true
		}
		if idle != nil && !idle() || r.ready() {
			least = 0
		}
	}
	for !r.closed.Load() {
		atomic.StoreUint32(r.sqTail, r.tail)
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.toSend), uintptr(least), enterGetEvents, 0, 0)
		if errno == 0 {
			r.toSend -= uint32(n)
		}
		switch {
		case errno == unix.EINTR: // by Go's own signals, too
		case errno == unix.EAGAIN, errno == unix.EBUSY:
			// Too much is under way; completions must be collected first.
			return nil
		case errno != 0:
			return fmt.Errorf("io_uring_enter: %w", errno)
		case r.toSend == 0 || r.ready():
			return nil
		}
	}
	return errClosed
}

// ready reports whether a completion waits.
func (r *Ring) ready() bool {
	return atomic.LoadUint32(r.cqTail) != *r.cqHead
}

// Pop returns the next completion that is there.
func (r *Ring) Pop() (CQE, bool) {
	r.use.Lock()
	defer r.use.Unlock()
	for !r.closed.Load() {
		if !r.ready() && !r.flushOverflow() {
			break
		}
		head := *r.cqHead
		c := r.cqes[head&r.cqMask]
		atomic.StoreUint32(r.cqHead, head+1)
		if c.UserData != wakeData {
			return c, true
		}
		r.armed = false
	}
	return CQE{}, false
}

// flushOverflow has the kernel pass on completions that it kept for want of
// room, and reports whether there are some.
func (r *Ring) flushOverflow() bool {
	if atomic.LoadUint32(r.sqFlags)&sqCQOverflow == 0 {
		return false
	}
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 0, 0, enterGetEvents, 0, 0)
	return errno == 0 && r.ready()
}

// Wake ends a Wait that is under way and has asked its idle. A Wait that begins
// later does not notice: what it should see, idle must tell. It may be called
// at any time, also after Close.
func (r *Ring) Wake() {
	if r.asleep.Swap(false) {
		r.signal()
	}
}

func (r *Ring) signal() {
	r.wakeMu.RLock()
	defer r.wakeMu.RUnlock()
	if r.wakeFD < 0 {
		return
	}
	one := [8]byte{1}            // little or big endian, it is not zero
	unix.Write(r.wakeFD, one[:]) //nolint:errcheck // it can only be too full to need another
}

// Close ends a Wait under way and releases the ring. Requests under way are
// cancelled by the kernel, some of them after Close has returned; memory that
// they name must stay until then. It is idempotent.
func (r *Ring) Close() error {
	r.closeOnce.Do(func() {
		r.closed.Store(true)
		r.signal()
		r.use.Lock()
		defer r.use.Unlock()
		r.closeErr = r.release()
	})
	return r.closeErr
}

func (r *Ring) release() error {
	var errs []error
	if r.ringMem != nil {
		errs = append(errs, unix.Munmap(r.ringMem))
	}
	if r.sqeMem != nil {
		errs = append(errs, unix.Munmap(r.sqeMem))
	}
	r.ringMem, r.sqeMem, r.cqes = nil, nil, nil
	errs = append(errs, unix.Close(r.fd))
	r.wakeMu.Lock()
	defer r.wakeMu.Unlock()
	if r.wakeFD >= 0 {
		errs = append(errs, unix.Close(r.wakeFD))
		r.wakeFD = -1
	}
	return errors.Join(errs...)
}
