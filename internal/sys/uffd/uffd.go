// Package uffd is the kernel's userfaultfd interface, and the PAGEMAP_SCAN
// ioctl that belongs to its asynchronous write tracking, without cgo.
//
// It does what the kernel does and no more, apart from two things: operations
// that were done in part are continued, and calls that a signal interrupted
// are repeated. Errors wrap the kernel's error number; where they say that a
// feature is absent, they are memferry.ErrNotSupported.
//
// The kernel's own description is in ioctl_userfaultfd(2), userfaultfd(2) and
// Documentation/admin-guide/mm/userfaultfd.rst; what it doesn't say is in
// docs/kernel-notes.md.
package uffd

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

// FD is a userfaultfd. Its methods are safe for concurrent use, except Close.
// The addresses they take are those of the process that opened it, which need
// not be this one.
type FD struct {
	fd       int
	features Feature
	userOnly bool
}

// Open makes a userfaultfd for this process with the given features. It does
// not block reads, and is closed on exec.
//
// It takes the first of three ways that this process may go: /dev/userfaultfd,
// the system call, and the system call for faults in user mode alone, where a
// system call that meets an absent page fails with EFAULT; see
// [FD.UserModeOnly].
func Open(features Feature) (*FD, error) {
	fd, userOnly, err := open()
	if err != nil {
		return nil, err
	}
	f := &FD{fd: fd, userOnly: userOnly}
	if f.features, err = f.negotiate(features); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return f, nil
}

// FromFD wraps a descriptor whose features another process negotiated, and
// takes ownership of it. It makes reads non-blocking for everyone who shares
// the descriptor.
func FromFD(fd int, features Feature) (*FD, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("userfaultfd: %w", err)
	}
	return &FD{fd: fd, features: features}, nil
}

// open returns a descriptor without features.
func open() (fd int, userOnly bool, err error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	if dev, err := unix.Open("/dev/userfaultfd", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), iocNew, flags)
		_ = unix.Close(dev)
		if errno == 0 {
			return int(fd), false, nil
		}
	}
	r, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	if errno == unix.EPERM {
		userOnly = true
		r, _, errno = unix.Syscall(unix.SYS_USERFAULTFD, flags|userModeOnly, 0, 0)
	}
	switch errno {
	case 0:
		return int(r), userOnly, nil
	case unix.ENOSYS:
		return 0, false, absent("userfaultfd", "4.3", "a kernel with CONFIG_USERFAULTFD", errno)
	case unix.EPERM, unix.EINVAL:
		return 0, false, absent("userfaultfd without privileges", "5.11",
			"set the sysctl vm.unprivileged_userfaultfd=1, give access to /dev/userfaultfd, or allow it in seccomp", errno)
	}
	return 0, false, fmt.Errorf("userfaultfd: %w", errno)
}

// negotiate performs UFFDIO_API, which a descriptor accepts once.
func (f *FD) negotiate(want Feature) (Feature, error) {
	a := apiArg{api: apiVersion, features: uint64(want)}
	err := f.ioctl(iocAPI, unsafe.Pointer(&a))
	if err == nil {
		// The kernel answers with all that it has, not with what was enabled.
		return want, nil
	}
	if !errors.Is(err, unix.EINVAL) {
		return 0, fmt.Errorf("userfaultfd: agree on features: %w", err)
	}
	for _, k := range known {
		if want&k.bit == 0 {
			continue
		}
		if err := Have(k.bit); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("userfaultfd: agree on features %#x: %w", uint64(want), err)
}

// Fd returns the descriptor, for polling and for passing it on.
func (f *FD) Fd() int { return f.fd }

// Features returns the features that were asked for.
func (f *FD) Features() Feature { return f.features }

// UserModeOnly reports whether faults inside system calls fail with EFAULT
// instead of being reported.
func (f *FD) UserModeOnly() bool { return f.userOnly }

// Close closes the descriptor. Closing the last duplicate ends all
// registrations, and lets waiting threads go on into zeroes.
func (f *FD) Close() error {
	if f.fd < 0 {
		return nil
	}
	err := unix.Close(f.fd)
	f.fd = -1
	return os.NewSyscallError("close", err)
}

// Register starts the reporting of faults in n bytes at addr, both multiples
// of the page size, and tells what can be done there.
func (f *FD) Register(addr, n uintptr, m Mode) (Ioctls, error) {
	a := registerArg{rangeArg: rangeArg{uint64(addr), uint64(n)}, mode: uint64(m)}
	if err := f.ioctl(iocRegister, unsafe.Pointer(&a)); err != nil {
		return 0, fmt.Errorf("userfaultfd: register %d bytes: %w", n, err)
	}
	return Ioctls(a.ioctls), nil
}

// Unregister ends it, and wakes who waits there. It also forgets which pages
// were write-protected.
func (f *FD) Unregister(addr, n uintptr) error {
	a := rangeArg{uint64(addr), uint64(n)}
	return f.do("unregister", iocUnregister, unsafe.Pointer(&a))
}

// Wake makes the threads that wait in the range try again.
func (f *FD) Wake(addr, n uintptr) error {
	a := rangeArg{uint64(addr), uint64(n)}
	return f.do("wake", iocWake, unsafe.Pointer(&a))
}

// WriteProtect protects the pages of a range against writes, or ends that and
// wakes who waits there.
func (f *FD) WriteProtect(addr, n uintptr, protect bool, flags Flags) error {
	a := protectArg{rangeArg: rangeArg{uint64(addr), uint64(n)}}
	if protect {
		a.mode |= 1 << 0 // UFFDIO_WRITEPROTECT_MODE_WP
	} else if flags&NoWake != 0 {
		a.mode |= 1 << 1 // UFFDIO_WRITEPROTECT_MODE_DONTWAKE
	}
	return f.do("write-protect", iocWriteProtect, unsafe.Pointer(&a))
}

// Copy puts the bytes of src into absent pages at dst, and wakes who waits for
// them. It returns how many bytes it placed. With an error, the page after
// them was there already (EEXIST; waiting threads are not woken), the address
// space is being changed and events want to be read (EAGAIN), the process is
// gone (ESRCH), or the range is not registered (ENOENT).
func (f *FD) Copy(dst uintptr, src []byte, flags Flags) (int, error) {
	defer runtime.KeepAlive(src)
	n := uintptr(len(src))
	done, err := f.advance("copy", n, func(at uintptr) (int64, error) {
		a := copyArg{dst: uint64(dst + at), src: address(unsafe.Pointer(unsafe.SliceData(src))) + uint64(at), len: uint64(n - at), mode: resolveMode(flags)}
		err := f.ioctl(iocCopy, unsafe.Pointer(&a))
		return a.done, err
	})
	return int(done), err
}

// Move moves pages from src, private anonymous memory of the same process that
// no other process maps, to absent pages at dst. See [FD.Copy]; the source has
// no pages afterwards.
func (f *FD) Move(dst, src, n uintptr, flags Flags) (int, error) {
	var mode uint64
	if flags&NoWake != 0 {
		mode |= 1 << 0 // UFFDIO_MOVE_MODE_DONTWAKE
	}
	if flags&AllowHoles != 0 {
		mode |= 1 << 1 // UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
	}
	done, err := f.advance("move", n, func(at uintptr) (int64, error) {
		a := copyArg{dst: uint64(dst + at), src: uint64(src + at), len: uint64(n - at), mode: mode}
		err := f.ioctl(iocMove, unsafe.Pointer(&a))
		return a.done, err
	})
	return int(done), err
}

// ZeroPage makes absent pages zero. See [FD.Copy]. It cannot protect them.
func (f *FD) ZeroPage(addr, n uintptr, flags Flags) (int, error) {
	return f.resolve("make zero", iocZeroPage, addr, n, flags&^Protect)
}

// Continue maps pages that the page cache holds. See [FD.Copy]; EFAULT says
// that there is no such page.
func (f *FD) Continue(addr, n uintptr, flags Flags) (int, error) {
	return f.resolve("continue", iocContinue, addr, n, flags)
}

// Poison makes absent pages fail: an access gives SIGBUS, until a Copy
// replaces them. See [FD.Copy].
func (f *FD) Poison(addr, n uintptr, flags Flags) (int, error) {
	return f.resolve("poison", iocPoison, addr, n, flags&^Protect)
}

func (f *FD) resolve(op string, ioc, addr, n uintptr, flags Flags) (int, error) {
	done, err := f.advance(op, n, func(at uintptr) (int64, error) {
		a := resolveArg{rangeArg: rangeArg{uint64(addr + at), uint64(n - at)}, mode: resolveMode(flags)}
		err := f.ioctl(ioc, unsafe.Pointer(&a))
		return a.done, err
	})
	return int(done), err
}

// resolveMode translates flags for copy, zeropage, continue and poison.
func resolveMode(flags Flags) (mode uint64) {
	if flags&NoWake != 0 {
		mode |= 1 << 0
	}
	if flags&Protect != 0 {
		mode |= 1 << 1
	}
	return mode
}

// advance repeats step, which starts at an offset and tells how far it came,
// as long as it makes progress. An operation that stopped in the middle fails
// with EAGAIN and says what it has done; the next attempt tells why.
func (f *FD) advance(op string, n uintptr, step func(at uintptr) (int64, error)) (uintptr, error) {
	var at uintptr
	for at < n {
		done, err := step(at)
		if done > 0 && (err == nil || errors.Is(err, unix.EAGAIN)) {
			at += min(uintptr(done), n-at)
			continue
		}
		if err == nil {
			err = unix.EAGAIN // never seen: neither progress nor an error
		}
		return at, fmt.Errorf("userfaultfd: %s %d bytes: %w", op, n-at, err)
	}
	return at, nil
}

// address is where p points, for a struct that the kernel reads. It makes p's
// target escape to the heap, where it stays put, unlike on a stack that grows.
// The caller keeps it alive.
func address(p unsafe.Pointer) uint64 {
	if escape.on {
		escape.to = p
	}
	return uint64(uintptr(p))
}

// escape is never on, which the compiler can't know.
var escape struct {
	on bool
	to unsafe.Pointer
}

func (f *FD) do(op string, ioc uintptr, arg unsafe.Pointer) error {
	if err := f.ioctl(ioc, arg); err != nil {
		return fmt.Errorf("userfaultfd: %s: %w", op, err)
	}
	return nil
}

func (f *FD) ioctl(ioc uintptr, arg unsafe.Pointer) error { return ioctl(f.fd, ioc, arg) }

func ioctl(fd int, ioc uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioc, uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}

// absent is the error of a feature that this system lacks.
func absent(feature, since, remedy string, err error) error {
	var u unix.Utsname
	release := "unknown"
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	text := fmt.Sprintf("%s: needs Linux %s (this is %s): %s", feature, since, release, remedy)
	if err == nil {
		return fmt.Errorf("%s: %w", text, memferry.ErrNotSupported)
	}
	return fmt.Errorf("%s: %w: %w", text, memferry.ErrNotSupported, err)
}
