package uffd

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Categories describe pages, PAGE_IS_* of linux/fs.h.
type Categories uint64

// The categories of pages.
const (
	PageWPAllowed Categories = 1 << 0
	PageWritten   Categories = 1 << 1 // since it was write-protected
	PageFile      Categories = 1 << 2
	PagePresent   Categories = 1 << 3
	PageSwapped   Categories = 1 << 4
	PagePFNZero   Categories = 1 << 5
	PageHuge      Categories = 1 << 6
)

// Run is a run of pages of the same categories: struct page_region.
type Run struct {
	Start, End uint64 // addresses
	Categories Categories
}

// scanArg is struct pm_scan_arg of linux/fs.h.
type scanArg struct {
	size, flags      uint64
	start, end       uint64
	walkEnd          uint64 // out
	vec, vecLen      uint64
	maxPages         uint64
	inverted         uint64
	maskCategories   uint64 // all of them must hold
	anyOfCategories  uint64 // and one of these, unless there are none
	returnCategories uint64
}

// scanProtect is PM_SCAN_WP_MATCHING, a flag of a scan.
const scanProtect = 1 << 0

// Scanner looks at the page tables of a process. Its methods are safe for
// concurrent use, except Close.
type Scanner struct{ fd int }

// OpenScanner opens the page tables of a process, which this one must be
// allowed to trace unless it is itself.
func OpenScanner(pid int) (*Scanner, error) {
	path := fmt.Sprintf("/proc/%d/pagemap", pid)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &Scanner{fd}, nil
}

// ScannerFromFD wraps a descriptor of another process's page tables, which it
// has passed on, and takes ownership of it.
func ScannerFromFD(fd int) *Scanner { return &Scanner{fd} }

// Fd returns the descriptor, for passing it on.
func (s *Scanner) Fd() int { return s.fd }

// Close closes it.
func (s *Scanner) Close() error {
	if s.fd < 0 {
		return nil
	}
	err := unix.Close(s.fd)
	s.fd = -1
	return os.NewSyscallError("close", err)
}

// maxRuns bounds the runs that one call of the kernel returns: 24 KiB of them.
const maxRuns = 1024

// Written passes each run of pages in [start, end) that were written to since
// they were last protected to fn, in ascending order, and protects them again.
// Looking and protecting are one step: no write in between is missed. Pages
// that are not there are left alone. fn is told of every run that has been
// protected, also after it failed once; its first error ends the scan, and what
// lies beyond stays as it was.
//
// What is not registered with [ModeWP] under [FeatureWPAsync] is passed over:
// the application may have unmapped a part. Writes through other mappings of
// the same memory don't count.
func (s *Scanner) Written(start, end uintptr, fn func(Run) error) error {
	// With PageWritten alone, the scan would also leave markers in holes.
	return s.written(start, end, PagePresent|PageSwapped, fn)
}

// WrittenOrGone is Written for pages of shared memory that have been mapped.
// Where the kernel takes a page out of the page tables that was written to, it
// leaves nothing (of a protected one, a marker): when it splits a huge page
// because a part of it was removed, reclaims memory, or on MADV_DONTNEED. So
// what is not there counts as written, and is protected by a marker. The run
// tells whether its pages are present.
func (s *Scanner) WrittenOrGone(start, end uintptr, fn func(Run) error) error {
	return s.written(start, end, 0, fn)
}

func (s *Scanner) written(start, end uintptr, anyOf Categories, fn func(Run) error) error {
	var vec [maxRuns]Run
	arg := scanArg{
		flags:            scanProtect,
		maskCategories:   uint64(PageWPAllowed | PageWritten),
		anyOfCategories:  uint64(anyOf),
		returnCategories: uint64(PageWritten | PagePresent),
	}
	return s.each(arg, start, end, vec[:], fn)
}

// Protected passes each run of pages in [start, end) to fn that are protected: so
// they have not been written to. In shared memory the kernel remembers it of
// pages that it has taken out of the page tables.
func (s *Scanner) Protected(start, end uintptr, fn func(Run) error) error {
	var vec [maxRuns]Run
	arg := scanArg{
		inverted:         uint64(PageWritten),
		maskCategories:   uint64(PageWPAllowed | PageWritten),
		anyOfCategories:  uint64(PagePresent | PageSwapped),
		returnCategories: uint64(PagePresent),
	}
	return s.each(arg, start, end, vec[:], fn)
}

// Present passes each run of pages in [start, end) that exist to fn.
func (s *Scanner) Present(start, end uintptr, fn func(Run) error) error {
	var vec [maxRuns]Run
	arg := scanArg{
		anyOfCategories:  uint64(PagePresent | PageSwapped),
		returnCategories: uint64(PagePresent),
	}
	return s.each(arg, start, end, vec[:], fn)
}

func (s *Scanner) each(arg scanArg, start, end uintptr, vec []Run, fn func(Run) error) error {
	for at := uint64(start); at < uint64(end); {
		arg.start, arg.end = at, uint64(end)
		n, walked, err := s.scan(arg, vec)
		if err != nil {
			return err
		}
		// What was protected has to be told, whatever fn says of the first.
		var failed error
		for _, r := range vec[:n] {
			if err := fn(r); err != nil && failed == nil {
				failed = err
			}
		}
		if failed != nil {
			return failed
		}
		if walked <= at {
			return fmt.Errorf("scan of page tables: no progress at %#x", at)
		}
		at = walked
	}
	return nil
}

func (s *Scanner) scan(arg scanArg, vec []Run) (n int, walked uint64, err error) {
	arg.size = uint64(unsafe.Sizeof(arg))
	if len(vec) > 0 {
		arg.vec, arg.vecLen = address(unsafe.Pointer(unsafe.SliceData(vec))), uint64(len(vec))
	}
	defer runtime.KeepAlive(vec)
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), iocPagemapScan, uintptr(unsafe.Pointer(&arg)))
		if errno == unix.EINTR {
			continue // before anything was done
		}
		if errno != 0 {
			return 0, 0, fmt.Errorf("scan of page tables: %w", errno)
		}
		return int(r), arg.walkEnd, nil
	}
}
