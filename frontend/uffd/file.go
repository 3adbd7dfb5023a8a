package uffd

import (
	"errors"
	"fmt"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/size"
)

const (
	pageSize = memferry.PageSize
	hugeSize = 2 << 20 // of a huge page, on the architectures we support
)

// roundUp returns n rounded up to whole pages.
func roundUp(n int64) int64 { return (n + pageSize - 1) &^ (pageSize - 1) }

// newFile returns a memory file of n bytes, of huge pages if possible.
func newFile(n int64, huge bool) (*os.File, error) {
	if huge && n >= hugeSize {
		if f, err := hugeFile(n); err == nil {
			return f, nil
		}
	}
	fd, err := unix.MemfdCreate("memferry", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create memfd: %w", err)
	}
	return resize(fd, n)
}

// hugeFile makes a file in a tmpfs of its own that has huge pages whatever the
// system's default for memfds is. The file system is never attached anywhere,
// and goes with the file. It takes the right to mount.
func hugeFile(n int64) (*os.File, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fs) //nolint:errcheck // a handle for making the mount
	for _, o := range [][2]string{{"huge", "always"}, {"size", "100%"}} {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return nil, err
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, err
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(mnt) //nolint:errcheck // the file keeps it
	fd, err := unix.Openat(mnt, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return resize(fd, n)
}

func resize(fd int, n int64) (*os.File, error) {
	f := os.NewFile(uintptr(fd), "memferry-memory")
	if err := f.Truncate(n); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// mapping is memory mapped from a file, aligned to huge pages.
type mapping struct {
	data []byte
	all  []byte
}

func mapFile(f *os.File, n int64, prot int) (mapping, error) {
	if n > math.MaxInt-hugeSize {
		return mapping{}, fmt.Errorf("map %s: %w", size.Format(n), unix.ENOMEM)
	}
	// Reserve more than is needed, and map over the aligned part of it.
	all, err := unix.Mmap(-1, 0, int(n)+hugeSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return mapping{}, fmt.Errorf("reserve %s of address space: %w", size.Format(n), err)
	}
	m := mapping{all: all}
	skip := int(-address(all) % hugeSize)
	m.data = all[skip : skip+int(n) : skip+int(n)]
	_, err = unix.MmapPtr(int(f.Fd()), 0, unsafe.Pointer(unsafe.SliceData(m.data)), uintptr(n), prot,
		unix.MAP_SHARED|unix.MAP_FIXED|unix.MAP_NORESERVE)
	if err != nil {
		return mapping{}, errors.Join(fmt.Errorf("map %s of memory: %w", size.Format(n), err), m.close())
	}
	return m, nil
}

func (m *mapping) close() error {
	if m.all == nil {
		return nil
	}
	err := unix.Munmap(m.all)
	m.all, m.data = nil, nil
	return os.NewSyscallError("munmap", err)
}

func address(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }
