package uffd

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const page = memferry.PageSize

// TestLayout: sizes and offsets as the compiler sees them in the headers of
// Linux 6.18 (linux/userfaultfd.h, linux/fs.h), on amd64 and arm64 alike.
func TestLayout(t *testing.T) {
	var (
		a apiArg
		r registerArg
		c copyArg
		z resolveArg
		w protectArg
		p scanArg
	)
	for _, tt := range []struct {
		name      string
		got, want uintptr
	}{
		{"uffdio_api", unsafe.Sizeof(a), 24},
		{"uffdio_api.ioctls", unsafe.Offsetof(a.ioctls), 16},
		{"uffdio_register", unsafe.Sizeof(r), 32},
		{"uffdio_register.ioctls", unsafe.Offsetof(r.ioctls), 24},
		{"uffdio_copy", unsafe.Sizeof(c), 40},
		{"uffdio_copy.copy", unsafe.Offsetof(c.done), 32},
		{"uffdio_zeropage", unsafe.Sizeof(z), 32},
		{"uffdio_zeropage.zeropage", unsafe.Offsetof(z.done), 24},
		{"uffdio_writeprotect", unsafe.Sizeof(w), 24},
		{"pm_scan_arg", unsafe.Sizeof(p), 96},
		{"pm_scan_arg.walk_end", unsafe.Offsetof(p.walkEnd), 32},
		{"pm_scan_arg.vec", unsafe.Offsetof(p.vec), 40},
		{"pm_scan_arg.max_pages", unsafe.Offsetof(p.maxPages), 56},
		{"pm_scan_arg.return_mask", unsafe.Offsetof(p.returnCategories), 88},
		{"page_region", unsafe.Sizeof(Run{}), 24},
		{"page_region.categories", unsafe.Offsetof(Run{}.Categories), 16},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, tt.got, tt.want)
		}
	}
	// _IOC(dir, type, nr, size), with _IOC_WRITE 1 and _IOC_READ 2.
	ioc := func(dir, typ, nr, size uintptr) uintptr { return dir<<30 | size<<16 | typ<<8 | nr }
	for _, tt := range []struct {
		name      string
		got, want uintptr
	}{
		{"USERFAULTFD_IOC_NEW", iocNew, ioc(0, 0xAA, 0, 0)},
		{"UFFDIO_API", iocAPI, ioc(3, 0xAA, 0x3F, unsafe.Sizeof(a))},
		{"UFFDIO_REGISTER", iocRegister, ioc(3, 0xAA, 0, unsafe.Sizeof(r))},
		{"UFFDIO_UNREGISTER", iocUnregister, ioc(2, 0xAA, 1, 16)},
		{"UFFDIO_WAKE", iocWake, ioc(2, 0xAA, 2, 16)},
		{"UFFDIO_COPY", iocCopy, ioc(3, 0xAA, 3, unsafe.Sizeof(c))},
		{"UFFDIO_ZEROPAGE", iocZeroPage, ioc(3, 0xAA, 4, unsafe.Sizeof(z))},
		{"UFFDIO_MOVE", iocMove, ioc(3, 0xAA, 5, unsafe.Sizeof(c))},
		{"UFFDIO_WRITEPROTECT", iocWriteProtect, ioc(3, 0xAA, 6, unsafe.Sizeof(w))},
		{"UFFDIO_CONTINUE", iocContinue, ioc(3, 0xAA, 7, unsafe.Sizeof(z))},
		{"UFFDIO_POISON", iocPoison, ioc(3, 0xAA, 8, unsafe.Sizeof(z))},
		{"PAGEMAP_SCAN", iocPagemapScan, ioc(3, 'f', 16, unsafe.Sizeof(p))},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %#x, want %#x", tt.name, tt.got, tt.want)
		}
	}
}

// openFD skips the test by name where the kernel lacks a feature.
func openFD(t *testing.T, features Feature) *FD {
	t.Helper()
	f, err := Open(features)
	if errors.Is(err, memferry.ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func anonymous(t *testing.T, n int) ([]byte, uintptr) {
	t.Helper()
	return mapped(t, n, -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

func mapped(t *testing.T, n, fd, flags int) ([]byte, uintptr) {
	t.Helper()
	m, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(m) }) //nolint:errcheck // a test's memory
	return m, uintptr(unsafe.Pointer(unsafe.SliceData(m)))
}

func memfd(t *testing.T, n int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("uffd-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) }) //nolint:errcheck // a test's file
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		t.Fatal(err)
	}
	return fd
}

func register(t *testing.T, f *FD, addr uintptr, n int, m Mode) Ioctls {
	t.Helper()
	can, err := f.Register(addr, uintptr(n), m)
	if err != nil {
		t.Fatal(err)
	}
	return can
}

func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i/page)*31 + byte(i) + seed
	}
	return p
}

func TestCopy(t *testing.T) {
	f := openFD(t, 0)
	m, addr := anonymous(t, 16*page)
	can := register(t, f, addr, len(m), ModeMissing)
	if can&(CanCopy|CanWake|CanZeroPage) != CanCopy|CanWake|CanZeroPage {
		t.Fatalf("anonymous memory has ioctls %#x", uint64(can))
	}
	src := pattern(len(m), 1)
	if n, err := f.Copy(addr+8*page, src[8*page:9*page], 0); n != page || err != nil {
		t.Fatalf("copy of a page: %d, %v", n, err)
	}
	// The ninth page is there: what comes before it is placed, and counted.
	n, err := f.Copy(addr, src, 0)
	if n != 8*page || !errors.Is(err, unix.EEXIST) {
		t.Fatalf("copy over a page: %d, %v", n, err)
	}
	if n, err := f.Copy(addr+9*page, src[9*page:], NoWake); n != 7*page || err != nil {
		t.Fatalf("copy of the rest: %d, %v", n, err)
	}
	if !bytes.Equal(m, src) {
		t.Fatal("the memory differs from what was copied")
	}
	if _, err := f.Copy(addr+uintptr(len(m)), src[:page], 0); err == nil || errors.Is(err, unix.EEXIST) {
		t.Fatalf("copy outside of the range: %v", err)
	}
}

func TestZeroPage(t *testing.T) {
	f := openFD(t, 0)
	m, addr := anonymous(t, 4*page)
	register(t, f, addr, len(m), ModeMissing)
	if n, err := f.ZeroPage(addr, 4*page, Protect); n != 4*page || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if !bytes.Equal(m, make([]byte, len(m))) {
		t.Fatal("not zero")
	}
	if n, err := f.ZeroPage(addr, page, 0); n != 0 || !errors.Is(err, unix.EEXIST) {
		t.Fatalf("again: %d, %v", n, err)
	}
}

// serve answers every fault by fn until the returned function is called.
func serve(t *testing.T, f *FD, fn func(Message)) (stop func()) {
	t.Helper()
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
			if _, err := unix.Poll(fds, 10); err != nil && !errors.Is(err, unix.EINTR) {
				t.Error(err)
				return
			}
			ms, err := f.Read(nil)
			if err != nil {
				t.Error(err)
				return
			}
			for _, m := range ms {
				fn(m)
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// TestFault: threads that wait are told of, and go on once they are served.
// They wait inside system calls, where the Go runtime can do without them.
func TestFault(t *testing.T) {
	f := openFD(t, FeatureThreadID|FeatureExactAddress)
	if f.UserModeOnly() {
		t.Skip("faults in system calls are not reported to this user")
	}
	m, addr := anonymous(t, 8*page)
	register(t, f, addr, len(m), ModeMissing)
	src := pattern(len(m), 2)
	var writes, others int
	stop := serve(t, f, func(m Message) {
		if m.Event != EventPagefault || m.Thread == 0 {
			others++
			return
		}
		if m.Fault&FaultWrite != 0 {
			writes++
		}
		off := uintptr(m.Addr) - addr
		off -= off % page
		if _, err := f.Copy(addr+off, src[off:off+page], 0); errors.Is(err, unix.EEXIST) {
			err = f.Wake(addr+off, page)
			if err != nil {
				t.Error(err)
			}
		} else if err != nil {
			t.Error(err)
		}
	})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			advice := unix.MADV_POPULATE_READ
			if i%2 == 1 {
				advice = unix.MADV_POPULATE_WRITE
			}
			if err := unix.Madvise(m[i*page:(i+1)*page], advice); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	stop()
	if !bytes.Equal(m, src) {
		t.Error("the memory differs from what was served")
	}
	if writes == 0 || others != 0 {
		t.Errorf("%d write faults and %d unexpected messages", writes, others)
	}
}

func TestContinue(t *testing.T) {
	f := openFD(t, FeatureMissingShmem|FeatureMinorShmem|FeatureWPShmem|FeatureWPAsync|FeaturePagefaultWP)
	fd := memfd(t, 8*page)
	m, addr := mapped(t, 8*page, fd, unix.MAP_SHARED)
	fill, _ := mapped(t, 8*page, fd, unix.MAP_SHARED)
	can := register(t, f, addr, len(m), ModeMissing|ModeMinor|ModeWP)
	if can&CanContinue == 0 {
		t.Fatalf("shared memory has ioctls %#x", uint64(can))
	}
	if _, err := f.Continue(addr, page, Protect); !errors.Is(err, unix.EFAULT) {
		t.Fatalf("continue of a hole: %v", err)
	}
	src := pattern(len(m), 3)
	copy(fill, src)
	if n, err := f.Continue(addr+4*page, page, Protect); n != page || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if n, err := f.Continue(addr, 8*page, Protect); n != 4*page || !errors.Is(err, unix.EEXIST) {
		t.Fatalf("over a page: %d, %v", n, err)
	}
	if n, err := f.Continue(addr+5*page, 3*page, Protect); n != 3*page || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if !bytes.Equal(m, src) {
		t.Fatal("the memory differs from what was filled in")
	}
	s := scanner(t)
	if w := written(t, s, addr, len(m)); len(w) != 0 {
		t.Fatalf("pages that were mapped protected count as written: %v", w)
	}
	m[2*page]++
	m[7*page]++
	if w := written(t, s, addr, len(m)); len(w) != 2 || w[0] != 2 || w[1] != 7 {
		t.Fatalf("written pages: %v, want 2 and 7", w)
	}
}

func scanner(t *testing.T) *Scanner {
	t.Helper()
	if err := HaveScan(); errors.Is(err, memferry.ErrNotSupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	s, err := OpenScanner(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func written(t *testing.T, s *Scanner, addr uintptr, n int) (pages []int) {
	t.Helper()
	err := s.Written(addr, addr+uintptr(n), func(r Run) error {
		for a := r.Start; a < r.End; a += page {
			pages = append(pages, int(a-uint64(addr))/page)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return pages
}

// TestWritten: on anonymous memory, more runs than one call returns, each
// told once.
func TestWritten(t *testing.T) {
	f := openFD(t, FeatureWPAsync|FeaturePagefaultWP)
	s := scanner(t)
	const pages = 3 * maxRuns
	m, addr := anonymous(t, pages*page)
	if _, err := f.Register(addr, uintptr(len(m)), ModeWP); err != nil {
		t.Fatal(err)
	}
	if w := written(t, s, addr, len(m)); len(w) != 0 {
		t.Fatalf("%d pages that don't exist count as written", len(w))
	}
	for i := 0; i < pages; i += 2 {
		m[i*page] = 1
	}
	w := written(t, s, addr, len(m))
	if len(w) != pages/2 {
		t.Fatalf("%d pages written, want %d", len(w), pages/2)
	}
	for i, p := range w {
		if p != 2*i {
			t.Fatalf("written page %d is %d, want %d", i, p, 2*i)
		}
	}
	if w := written(t, s, addr, len(m)); len(w) != 0 {
		t.Fatalf("%d pages count as written a second time", len(w))
	}
	var present uint64
	if err := s.Present(addr, addr+uintptr(len(m)), func(r Run) error { present += (r.End - r.Start) / page; return nil }); err != nil {
		t.Fatal(err)
	}
	if present != pages/2 {
		t.Errorf("%d pages present, want %d", present, pages/2)
	}
	stop := errors.New("stop")
	m[0]++
	if err := s.Written(addr, addr+uintptr(len(m)), func(Run) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("an error of the function: %v", err)
	}
}

// TestWriteProtect: the synchronous kind reports each write before it happens.
func TestWriteProtect(t *testing.T) {
	f := openFD(t, FeaturePagefaultWP)
	m, addr := anonymous(t, page)
	m[0] = 1
	register(t, f, addr, page, ModeWP)
	if err := f.WriteProtect(addr, page, true, 0); err != nil {
		t.Fatal(err)
	}
	var faults int
	stop := serve(t, f, func(msg Message) {
		if msg.Fault&FaultWP != 0 {
			faults++
		}
		if err := f.WriteProtect(addr, page, false, 0); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Madvise(m, unix.MADV_POPULATE_WRITE); err != nil {
		t.Error(err)
	}
	stop()
	m[0]++
	if faults == 0 || m[0] != 2 {
		t.Errorf("%d faults, value %d", faults, m[0])
	}
}

// TestPoison: a system call that meets a poisoned page fails; a copy heals it.
func TestPoison(t *testing.T) {
	f := openFD(t, FeaturePoison)
	m, addr := anonymous(t, 2*page)
	register(t, f, addr, len(m), ModeMissing)
	if n, err := f.Poison(addr, 2*page, 0); n != 2*page || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if err := unix.Madvise(m[:page], unix.MADV_POPULATE_READ); !errors.Is(err, unix.EHWPOISON) {
		t.Fatalf("populate of a poisoned page: %v", err)
	}
	src := pattern(2*page, 4)
	if _, err := f.Copy(addr, src, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m, src) {
		t.Error("the healed page differs")
	}
}

func TestMove(t *testing.T) {
	f := openFD(t, FeatureMove)
	m, addr := anonymous(t, 4*page)
	from, src := anonymous(t, 4*page)
	register(t, f, addr, len(m), ModeMissing)
	want := pattern(4*page, 5)
	copy(from, want)
	if n, err := f.Move(addr, src, 4*page, 0); n != 4*page || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if !bytes.Equal(m, want) || !bytes.Equal(from, make([]byte, 4*page)) {
		t.Error("the pages were not moved")
	}
}

// TestRemove: what the application drops is told as an event.
func TestRemove(t *testing.T) {
	f := openFD(t, FeatureEventRemove)
	m, addr := anonymous(t, 4*page)
	register(t, f, addr, len(m), ModeMissing)
	if _, err := f.ZeroPage(addr, 4*page, 0); err != nil {
		t.Fatal(err)
	}
	var got Message
	stop := serve(t, f, func(m Message) { got = m })
	if err := unix.Madvise(m[page:3*page], unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	stop()
	if want := (Message{Event: EventRemove, Addr: uint64(addr) + page, Len: 2 * page}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestUnregister(t *testing.T) {
	f := openFD(t, 0)
	m, addr := anonymous(t, page)
	register(t, f, addr, page, ModeMissing)
	if err := f.Unregister(addr, page); err != nil {
		t.Fatal(err)
	}
	if m[0] != 0 {
		t.Error("not zero")
	}
	if ms, err := f.Read(nil); len(ms) != 0 || err != nil {
		t.Errorf("%v, %v", ms, err)
	}
	for range 2 {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestAbsent: a missing feature says what it is, and since when it exists.
func TestAbsent(t *testing.T) {
	if _, err := Available(); err != nil {
		t.Skip(err)
	}
	const unknown = 1 << 63
	_, err := Open(unknown)
	if !errors.Is(err, memferry.ErrNotSupported) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("an unknown feature: %v", err)
	}
	err = Have(unknown)
	if !errors.Is(err, memferry.ErrNotSupported) {
		t.Errorf("an unknown feature: %v", err)
	}
	err = absent("userfaultfd poison", "6.6", "update the kernel", unix.EINVAL)
	if !errors.Is(err, memferry.ErrNotSupported) || !errors.Is(err, unix.EINVAL) ||
		!strings.Contains(err.Error(), "poison") || !strings.Contains(err.Error(), "6.6") || !strings.Contains(err.Error(), "update") {
		t.Errorf("the error says: %v", err)
	}
}

// TestFromFD: a duplicate works alone, and never blocks.
func TestFromFD(t *testing.T) {
	f := openFD(t, 0)
	fd, err := unix.FcntlInt(uintptr(f.Fd()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	d, err := FromFD(fd, f.Features())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	start := time.Now()
	if ms, err := d.Read(nil); len(ms) != 0 || err != nil || time.Since(start) > time.Minute {
		t.Errorf("%v, %v", ms, err)
	}
}
