package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/testenv"
)

// The system calls of a file, on a mount of a real region behind a real server.
// The test's own process is the application: the mount is served by another.

// sides are the ways to mount, and when what an application has synced must be
// at the source.
var sides = []struct {
	name  string
	flags []string
	late  bool // only after umount
}{
	{"memory", nil, true},
	{"memory remote", []string{"--durability=remote"}, false},
	{"cache", []string{"--cache=DIR"}, true},
	{"cache remote", []string{"--cache=DIR", "--durability=remote"}, false},
	{"direct", []string{"--direct"}, false},
}

// onSides runs a test on a mount of each kind. The source holds content at
// first, and must hold what the test returns once that was synced.
//
// There is no link in between: it would be of this process, and a page fault
// within the Go runtime, in a copy from or to a mapping of the mount, keeps
// the collector, and with it the link, from going on.
func onSides(t *testing.T, content []byte, test func(t *testing.T, m *mounted, f *os.File) []byte) {
	for _, side := range sides {
		t.Run(side.name, func(t *testing.T) {
			disk := file(t, "disk", content)
			s := serve(t, "disk="+disk)
			flags := strings.Split(strings.ReplaceAll(strings.Join(side.flags, " "), "DIR", filepath.Join(t.TempDir(), "cache")), " ")
			if len(side.flags) == 0 {
				flags = nil
			}
			m := mount(t, s.uri("disk"), filepath.Join(t.TempDir(), "disk"), flags...)
			f := m.open(unix.O_RDWR)
			want := test(t, m, f)
			holds(t, m.path, want)
			if !side.late {
				holds(t, disk, want)
			}
			f.Close()
			m.umount()
			holds(t, disk, want)
		})
	}
}

// open opens the mounted file; the test closes it at its end, if not before.
func (m *mounted) open(flags int) *os.File {
	m.t.Helper()
	fd, err := unix.Open(m.path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		m.t.Fatalf("open %s: %v", m.path, err)
	}
	f := os.NewFile(uintptr(fd), m.path)
	m.t.Cleanup(func() { f.Close() })
	return f
}

// mountStatus is what these tests look at of "memferry status".
type mountStatus struct {
	Passthrough bool `json:"passthrough"`
	Region      struct {
		PullComplete bool  `json:"pull_complete"`
		PulledBytes  int64 `json:"pulled_bytes"`
		DemandReads  int64 `json:"demand_reads"`
	} `json:"region"`
}

func (m *mounted) status() (s mountStatus) {
	m.t.Helper()
	out := output(m.t, memferry, "status", "--json", m.path)
	if err := json.Unmarshal(out, &s); err != nil {
		m.t.Fatalf("status --json: %v\n%s", err, out)
	}
	return s
}

func (m *mounted) pulled() {
	m.t.Helper()
	m.eventually("the pull", func() error {
		if s := m.status(); !s.Region.PullComplete {
			return fmt.Errorf("%d bytes were pulled", s.Region.PulledBytes)
		}
		return nil
	})
}

func TestMountFallocate(t *testing.T) {
	const size = 8*mib + 1000
	const keep = unix.FALLOC_FL_KEEP_SIZE
	onSides(t, pattern(60, size), func(t *testing.T, _ *mounted, f *os.File) []byte {
		want := pattern(60, size)
		write := func(off, n int64) {
			copy(want[off:], pattern(uint64(off), n))
			if _, err := f.WriteAt(want[off:off+n], off); err != nil {
				t.Fatal(err)
			}
		}
		zero := func(mode uint32, off, n int64) {
			if err := unix.Fallocate(int(f.Fd()), mode, off, n); err != nil {
				t.Fatalf("fallocate mode %#x of %d bytes at %d: %v", mode, n, off, err)
			}
			clear(want[off:min(off+n, size)])
		}
		zero(unix.FALLOC_FL_PUNCH_HOLE|keep, mib, mib)                  // whole pages
		zero(unix.FALLOC_FL_PUNCH_HOLE|keep, 3*mib+100, 50)             // within a page
		zero(unix.FALLOC_FL_PUNCH_HOLE|keep, 3*mib+5000, 100_000)       // edges
		zero(unix.FALLOC_FL_ZERO_RANGE, 4*mib+7, 200_000)               //
		zero(unix.FALLOC_FL_ZERO_RANGE|keep, 5*mib, 4096)               //
		zero(unix.FALLOC_FL_PUNCH_HOLE|keep, size-500, 500)             // the end
		zero(unix.FALLOC_FL_PUNCH_HOLE|keep, 8*mib, 10*mib)             // across it
		write(mib+4096, 10_000)                                         // into a hole
		write(6*mib, 3*4096)                                            // and not yet written out
		zero(unix.FALLOC_FL_PUNCH_HOLE|keep, 6*mib+100, 2*4096)         //
		if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil { // allocates, changes nothing
			t.Errorf("fallocate of what is there: %v", err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		return want
	})
}

// TestMountMmap writes through a shared mapping, with msync alone.
func TestMountMmap(t *testing.T) {
	const size = 4*mib + 100
	onSides(t, pattern(61, size), func(t *testing.T, m *mounted, f *os.File) []byte {
		p, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := unix.Munmap(p); err != nil {
				t.Error(err)
			}
		}()
		want := pattern(61, size)
		rng := testenv.Rand(t)
		for i := range 200 {
			q := pattern(uint64(i), 1+rng.Int64N(9000))
			off := rng.Int64N(size)
			if i == 0 {
				off = size - 50 // the short last page
			}
			q = q[:min(int64(len(q)), size-off)]
			copy(p[off:], q)
			copy(want[off:], q)
		}
		// What another handle reads and writes is the same memory.
		other := m.open(unix.O_RDWR)
		holds(t, m.path, want)
		copy(want[mib+5:], "by write")
		if _, err := other.WriteAt([]byte("by write"), mib+5); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want) {
			t.Error("the mapping does not show a write")
		}
		if err := unix.Msync(p, unix.MS_SYNC); err != nil {
			t.Fatalf("msync: %v", err)
		}
		other.Close()
		return want
	})
}

// TestMountDirectIO: O_DIRECT as disks have it, and, as FUSE needs no
// alignment, without it.
func TestMountDirectIO(t *testing.T) {
	const size = 4*mib + 1000
	onSides(t, pattern(62, size), func(t *testing.T, m *mounted, f *os.File) []byte {
		d := m.open(unix.O_RDWR | unix.O_DIRECT)
		buf, err := unix.Mmap(-1, 0, 2<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(buf) //nolint:errcheck // a test's
		want := pattern(62, size)
		for i, c := range []struct{ off, n, skew int64 }{
			{0, 4096, 0}, {mib, mib, 0}, {2 * mib, mib + 8192, 0}, {3*mib + 512, 512, 0}, // aligned
			{4 * mib, 1000, 0}, {mib + 1, 5000, 0}, {3, 4096, 0}, {4096, 4096, 7}, {size - 1, 1, 1}, // not
		} {
			p := buf[c.skew : c.skew+c.n]
			if n, err := unix.Pread(int(d.Fd()), p, c.off); int64(n) != c.n || err != nil || !bytes.Equal(p, want[c.off:c.off+c.n]) {
				t.Fatalf("direct read of %d at %d: %d, %v, or other bytes", c.n, c.off, n, err)
			}
			copy(p, pattern(uint64(100+i), c.n))
			copy(want[c.off:], p)
			if n, err := unix.Pwrite(int(d.Fd()), p, c.off); int64(n) != c.n || err != nil {
				t.Fatalf("direct write of %d at %d: %d, %v", c.n, c.off, n, err)
			}
			got := make([]byte, c.n)
			if _, err := f.ReadAt(got, c.off); err != nil || !bytes.Equal(got, p) {
				t.Fatalf("a buffered read after a direct write of %d at %d: %v, or other bytes", c.n, c.off, err)
			}
			// And the other way round: direct reads see what is only cached.
			copy(want[c.off:], "buffered"[:min(8, c.n)])
			if _, err := f.WriteAt(want[c.off:c.off+min(8, c.n)], c.off); err != nil {
				t.Fatal(err)
			}
			if n, err := unix.Pread(int(d.Fd()), p, c.off); int64(n) != c.n || err != nil || !bytes.Equal(p, want[c.off:c.off+c.n]) {
				t.Fatalf("direct read of %d at %d after a buffered write: %d, %v, or other bytes", c.n, c.off, n, err)
			}
		}
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
		d.Close()
		return want
	})
}

// TestMountEnd: the file can be written up to its end, and neither grows nor
// shrinks.
func TestMountEnd(t *testing.T) {
	const size = 2*mib + 1234
	onSides(t, pattern(63, size), func(t *testing.T, m *mounted, f *os.File) []byte {
		want := pattern(63, size)
		refuse := func(what string, err error, allowed ...error) {
			t.Helper()
			for _, a := range allowed {
				if errors.Is(err, a) {
					return
				}
			}
			t.Errorf("%s: %v, want %v", what, err, allowed)
		}
		sizeStays := func(what string) {
			t.Helper()
			m.eventually(what, func() error {
				if st, err := os.Stat(m.path); err != nil || st.Size() != size {
					return fmt.Errorf("%v bytes, %w", st.Size(), err)
				}
				return nil
			})
		}
		copy(want[size-10:], "right here")
		if _, err := f.WriteAt([]byte("right here"), size-10); err != nil {
			t.Errorf("write up to the end: %v", err)
		}
		for _, n := range []int64{0, size - 1, size + 1, 1 << 40} {
			refuse(fmt.Sprintf("truncate to %d", n), f.Truncate(n), unix.EPERM, unix.EFBIG)
		}
		if err := f.Truncate(size); err != nil {
			t.Errorf("truncate to the same: %v", err)
		}
		_, err := unix.Open(m.path, unix.O_WRONLY|unix.O_TRUNC, 0)
		refuse("open with O_TRUNC", err, unix.EPERM)
		refuse("fallocate beyond", unix.Fallocate(int(f.Fd()), 0, 0, size+1), unix.ENOSPC, unix.EFBIG)
		d := m.open(unix.O_RDWR | unix.O_DIRECT)
		_, err = unix.Pwrite(int(d.Fd()), []byte("x"), size)
		refuse("direct write beyond", err, unix.ENOSPC, unix.EFBIG)
		_, err = unix.Pwrite(int(d.Fd()), make([]byte, 100), size-50)
		refuse("direct write across the end", err, unix.ENOSPC, unix.EFBIG)
		d.Close()
		a := m.open(unix.O_WRONLY | unix.O_APPEND)
		_, err = unix.Write(int(a.Fd()), []byte("x"))
		refuse("append", err, unix.ENOSPC, unix.EFBIG)
		a.Close()
		sizeStays("the size after refusals")

		// Buffered, the kernel accepts it and learns of the refusal later.
		_, err = f.WriteAt([]byte("beyond"), size+100)
		if err == nil {
			err = f.Sync()
		}
		refuse("write beyond and fsync", err, unix.ENOSPC, unix.EFBIG)
		sizeStays("the size after a buffered write beyond the end")
		if err := f.Sync(); err != nil {
			t.Errorf("fsync after the refusal was reported: %v", err)
		}
		return want
	})
}

func TestMountStatfs(t *testing.T) {
	for _, size := range []int64{mib, mib + 1, 5000} {
		disk := file(t, "disk", pattern(64, size))
		s := serve(t, "disk="+disk)
		for _, flags := range [][]string{nil, {"--direct"}, {"--read-only"}} {
			m := mount(t, s.uri("disk"), filepath.Join(t.TempDir(), "disk"), flags...)
			var fs unix.Statfs_t
			if err := unix.Statfs(m.path, &fs); err != nil {
				t.Fatal(err)
			}
			const fuseMagic = 0x65735546 // statfs(2)
			if fs.Type != fuseMagic || fs.Bsize != 4096 || int64(fs.Blocks) != (size+4095)/4096 || fs.Bfree != 0 || fs.Bavail != 0 || fs.Files != 1 || fs.Namelen != 255 {
				t.Errorf("%d bytes: statfs says %+v", size, fs)
			}
			if readOnly := fs.Flags&unix.ST_RDONLY != 0; readOnly != (len(flags) > 0 && flags[0] == "--read-only") {
				t.Errorf("%v: read-only %v", flags, readOnly)
			}
			var st unix.Stat_t
			if err := unix.Stat(m.path, &st); err != nil || st.Size != size || st.Blksize != 4096 || st.Nlink != 1 {
				t.Errorf("%d bytes: stat says %+v, %v", size, st, err)
			}
			m.umount()
		}
	}
}
