package fuse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// Applications are played by children of the test binary, because mapping a
// file in the process that serves it can deadlock. envHelper names the part.
const envHelper = "MEMFERRY_FUSE_HELPER"

// hang bounds what would otherwise hang for ever.
const hang = 60 * time.Second

func TestMain(m *testing.M) {
	if name := os.Getenv(envHelper); name != "" {
		if err := helpers[name](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testenv.Main(m)
}

var helpers map[string]func(args []string) error

func init() {
	helpers = map[string]func([]string) error{
		"hello":     func([]string) error { fmt.Println("hello from the mount"); return nil },
		"readwrite": helpReadWrite,
		"mmap":      helpMmap,
		"errnos":    helpErrnos,
		"readonly":  helpReadOnly,
		"seek":      helpSeek,
		"read":      helpRead,
		"write":     helpWrite,
		"punch":     helpPunch,
		"hold":      helpHold,
		"mapread":   helpMapRead,
		"serve":     helpServe,
		"askself":   helpAskSelf,
		"selfmount": helpSelfMount,
		"strangers": helpStrangers,
	}
}

// helper prepares a child; it is killed when the test ends.
func helper(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	return helperAt(t, os.Args[0], name, args...)
}

func helperAt(t *testing.T, binary, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = append(os.Environ(), envHelper+"="+name)
	return cmd
}

// run runs a child to its end and returns what it printed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := helper(t, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("helper %s: %v\n%s", name, err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

// start starts a child and returns its first line of output.
func start(t *testing.T, name string, args ...string) (*exec.Cmd, io.WriteCloser, string) {
	t.Helper()
	cmd := helper(t, name, args...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // it may have ended
		cmd.Wait()         //nolint:errcheck // likewise
	})
	line := make([]byte, 200)
	n, err := out.Read(line)
	if err != nil && n == 0 {
		t.Fatalf("helper %s said nothing: %v", name, err)
	}
	return cmd, in, strings.TrimSpace(string(line[:n]))
}

func open(path string, flags int) (int, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// helpReadWrite makes random accesses and compares them with a model; it
// prints the checksum of what the file must hold in the end.
func helpReadWrite(args []string) error {
	path := args[0]
	seed, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return err
	}
	model, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	buffered, err := open(path, unix.O_RDWR)
	if err != nil {
		return err
	}
	direct, err := open(path, unix.O_RDWR|unix.O_DIRECT)
	if err != nil {
		return err
	}
	page, err := unix.Mmap(-1, 0, 2<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(uint64(seed), 0))
	for i := range 400 {
		off, n := r.IntN(len(model)), 1+r.IntN(64<<10)
		if r.IntN(20) == 0 {
			n = 1 + r.IntN(len(page))
		}
		fd := buffered
		if r.IntN(2) == 0 {
			fd = direct
			off, n = off&^4095, (n+4095)&^4095
		}
		n = min(n, len(model)-off)
		if fd == direct && n%512 != 0 {
			continue
		}
		p := page[:n]
		if r.IntN(2) == 0 {
			fill(r, p)
			copy(model[off:], p)
			if m, err := unix.Pwrite(fd, p, int64(off)); err != nil || m != n {
				return fmt.Errorf("step %d: write of %d at %d: %d, %w", i, n, off, m, err)
			}
			continue
		}
		if m, err := unix.Pread(fd, p, int64(off)); err != nil || m != n {
			return fmt.Errorf("step %d: read of %d at %d: %d, %w", i, n, off, m, err)
		}
		if !bytes.Equal(p, model[off:off+n]) {
			return fmt.Errorf("step %d: read of %d at %d differs", i, n, off)
		}
	}
	if err := unix.Fsync(buffered); err != nil {
		return err
	}
	fmt.Printf("%x\n", sha256.Sum256(model))
	return nil
}

func fill(r *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}

// helpMmap writes through one shared mapping and reads through another.
func helpMmap(args []string) error {
	fd, err := open(args[0], unix.O_RDWR)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	w, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for i := 0; i < len(w); i += 3000 {
		w[i] ^= 0xff
	}
	if err := unix.Msync(w, unix.MS_SYNC); err != nil {
		return err
	}
	r, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	if !bytes.Equal(r, w) {
		return errors.New("mapping and file differ")
	}
	fmt.Printf("%x\n", sha256.Sum256(w))
	return nil
}

// want collects what an operation must return.
type want struct{ errs []error }

func (w *want) errno(op string, got error, errno syscall.Errno) {
	if errno == 0 && got == nil {
		return
	}
	if !errors.Is(got, errno) {
		w.errs = append(w.errs, fmt.Errorf("%s: got %v, want %v", op, got, errno)) //nolint:errorlint // got may be nil
	}
}

func helpErrnos(args []string) error {
	path, writeBack := args[0], args[1] == "true"
	var w want
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	size := st.Size
	w.errno("truncate to the same", unix.Truncate(path, size), 0)
	w.errno("truncate to less", unix.Truncate(path, size-1), unix.EPERM)
	w.errno("truncate to 0", unix.Truncate(path, 0), unix.EPERM)
	w.errno("truncate to more", unix.Truncate(path, size+1), unix.EFBIG)
	_, err := open(path, unix.O_WRONLY|unix.O_TRUNC)
	w.errno("open with O_TRUNC", err, unix.EPERM)

	fd, err := open(path, unix.O_WRONLY|unix.O_APPEND)
	w.errno("open with O_APPEND", err, 0)
	_, err = unix.Write(fd, []byte("x"))
	w.errno("append", err, unix.ENOSPC)
	unix.Close(fd)

	fd, err = open(path, unix.O_RDWR|unix.O_DIRECT)
	w.errno("open with O_DIRECT", err, 0)
	page, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	w.errno("mmap", err, 0)
	_, err = unix.Pwrite(fd, page[:4096], size)
	w.errno("direct write past the end", err, unix.ENOSPC)
	_, err = unix.Pwrite(fd, page, size-4096)
	w.errno("direct write across the end", err, unix.ENOSPC)
	n, err := unix.Pread(fd, page, size-4096)
	if n != 4096 || err != nil {
		w.errs = append(w.errs, fmt.Errorf("read across the end: %d, %w", n, err))
	}
	unix.Close(fd)

	fd, err = open(path, unix.O_RDWR)
	w.errno("open", err, 0)
	_, err = unix.Pwrite(fd, []byte("beyond"), size+10)
	if writeBack {
		w.errno("buffered write past the end", err, 0)
		w.errno("fsync after it", unix.Fsync(fd), unix.ENOSPC)
	} else {
		w.errno("write past the end", err, unix.ENOSPC)
	}
	for range 500 {
		if err := unix.Fstat(fd, &st); err != nil || st.Size == size {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if st.Size != size {
		w.errs = append(w.errs, fmt.Errorf("size stays %d after a write past the end, want %d", st.Size, size))
	}
	w.errno("fsync again", unix.Fsync(fd), 0)

	w.errno("fallocate within", unix.Fallocate(fd, 0, 0, size), 0)
	w.errno("fallocate beyond", unix.Fallocate(fd, 0, 0, size+1), unix.ENOSPC)
	w.errno("collapse", unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096), unix.EOPNOTSUPP)
	_, err = unix.Pwrite(fd, bytes.Repeat([]byte{7}, 3*4096), 0)
	w.errno("write", err, 0)
	w.errno("punch", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096), 0)
	w.errno("zero", unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 8192, 4096), 0)
	w.errno("punch far away", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, size+8192, 4096), 0)
	got := make([]byte, 3*4096)
	_, err = unix.Pread(fd, got, 0)
	w.errno("read", err, 0)
	expect := make([]byte, 3*4096)
	copy(expect[4096:8192], bytes.Repeat([]byte{7}, 4096))
	if !bytes.Equal(got, expect) {
		w.errs = append(w.errs, errors.New("punched and zeroed pages are not as expected"))
	}
	unix.Close(fd)

	_, err = unix.Getxattr(path, "user.x", nil)
	w.errno("getxattr", err, unix.EOPNOTSUPP)
	w.errno("setxattr", unix.Setxattr(path, "user.x", []byte("y"), 0), unix.EOPNOTSUPP)
	w.errno("chmod", unix.Chmod(path, 0o600), 0)
	when := unix.Timeval{Sec: 1e9}
	w.errno("utimes", unix.Utimes(path, []unix.Timeval{when, when}), 0)
	w.errno("stat", unix.Stat(path, &st), 0)
	if st.Mode&0o777 != 0o600 || st.Mtim.Sec != 1e9 {
		w.errs = append(w.errs, fmt.Errorf("mode %o and mtime %d after chmod and utimes", st.Mode, st.Mtim.Sec))
	}
	var fs unix.Statfs_t
	w.errno("statfs", unix.Statfs(path, &fs), 0)
	if int64(fs.Blocks)*fs.Bsize != size {
		w.errs = append(w.errs, fmt.Errorf("statfs: %d blocks of %d", fs.Blocks, fs.Bsize))
	}
	return errors.Join(w.errs...)
}

// helpStrangers tries what a directory of one file refuses.
func helpStrangers(args []string) error {
	var w want
	other := filepath.Join(args[0], "other")
	_, err := open(other, unix.O_RDONLY)
	w.errno("open", err, unix.ENOENT)
	_, err = open(other, unix.O_CREAT|unix.O_WRONLY)
	w.errno("create", err, unix.EPERM)
	w.errno("mkdir", unix.Mkdir(other, 0o700), unix.EPERM)
	w.errno("symlink", unix.Symlink("x", other), unix.EPERM)
	file := filepath.Join(args[0], args[1])
	w.errno("link", unix.Link(file, other), unix.EPERM)
	w.errno("rename", unix.Rename(file, other), unix.EPERM)
	w.errno("unlink", unix.Unlink(file), unix.EPERM)
	return errors.Join(w.errs...)
}

func helpReadOnly(args []string) error {
	var w want
	_, err := open(args[0], unix.O_RDWR)
	w.errno("open for writing", err, unix.EROFS)
	w.errno("truncate", unix.Truncate(args[0], 0), unix.EROFS)
	w.errno("chmod", unix.Chmod(args[0], 0o600), unix.EROFS)
	fd, err := open(args[0], unix.O_RDONLY)
	w.errno("open", err, 0)
	p := make([]byte, 4096)
	_, err = unix.Pread(fd, p, 0)
	w.errno("read", err, 0)
	w.errno("fsync", unix.Fsync(fd), 0)
	return errors.Join(w.errs...)
}

// helpSeek writes one page, and without a sync asks where it is.
func helpSeek(args []string) error {
	fd, err := open(args[0], unix.O_RDWR)
	if err != nil {
		return err
	}
	var w want
	const at = 100 * 4096
	_, err = unix.Seek(fd, 0, unix.SEEK_DATA)
	w.errno("no data", err, unix.ENXIO)
	_, err = unix.Pwrite(fd, []byte("data"), at)
	w.errno("write", err, 0)
	off, err := unix.Seek(fd, 5, unix.SEEK_DATA)
	w.errno("data", err, 0)
	if off != at {
		w.errs = append(w.errs, fmt.Errorf("data found at %d, want %d", off, at))
	}
	off, err = unix.Seek(fd, at+5, unix.SEEK_HOLE)
	w.errno("hole", err, 0)
	if off != at+4096 {
		w.errs = append(w.errs, fmt.Errorf("hole found at %d, want %d", off, at+4096))
	}
	_, err = unix.Seek(fd, at+4096, unix.SEEK_DATA)
	w.errno("no more data", err, unix.ENXIO)
	_, err = unix.Seek(fd, 1<<40, unix.SEEK_HOLE)
	w.errno("hole past the end", err, unix.ENXIO)
	return errors.Join(w.errs...)
}

// helpRead reads one page, prints its first byte or the errno. It handles
// SIGUSR1, and says so first.
func helpRead(args []string) error {
	page, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	signal.Notify(make(chan os.Signal, 1), unix.SIGUSR1)
	fd, err := open(args[0], unix.O_RDONLY)
	if err != nil {
		return err
	}
	fmt.Println("reading")
	p := make([]byte, 1)
	_, err = unix.Pread(fd, p, int64(page)*4096)
	var errno syscall.Errno
	if errors.As(err, &errno) {
		fmt.Println(unix.ErrnoName(errno))
		return nil
	}
	fmt.Println(p[0])
	return err
}

// helpWrite writes and syncs one byte, and prints the errno.
func helpWrite(args []string) error {
	fd, err := open(args[0], unix.O_RDWR)
	if err != nil {
		return err
	}
	_, err = unix.Pwrite(fd, []byte{9}, 0)
	if err == nil {
		err = unix.Fsync(fd)
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		fmt.Println(unix.ErrnoName(errno))
		return nil
	}
	fmt.Println("ok")
	return err
}

// helpPunch punches a hole in the first page.
func helpPunch(args []string) error {
	fd, err := open(args[0], unix.O_RDWR)
	if err != nil {
		return err
	}
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
}

// helpMapRead touches a page of a mapping; a failure is a SIGBUS.
func helpMapRead(args []string) error {
	page, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	signal.Notify(make(chan os.Signal, 1), unix.SIGUSR1)
	fd, err := open(args[0], unix.O_RDONLY)
	if err != nil {
		return err
	}
	p, err := unix.Mmap(fd, int64(page)*4096, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	fmt.Println("reading")
	fmt.Println(p[0])
	return nil
}

// helpHold holds the file open until its input ends, answering each line with
// the byte at the offset that it names.
func helpHold(args []string) error {
	fd, err := open(args[0], unix.O_RDONLY)
	if err != nil {
		return err
	}
	fmt.Println("holding")
	for {
		var off int64
		if _, err := fmt.Scanln(&off); err != nil {
			return nil
		}
		p := make([]byte, 1)
		if _, err := unix.Pread(fd, p, off); err != nil {
			return err
		}
		fmt.Println(p[0])
	}
}

// helpServe mounts, and waits to be killed.
func helpServe(args []string) error {
	m, err := newMemory(1 << 20)
	if err != nil {
		return err
	}
	if _, err := Mount(context.Background(), m, args[0], Options{}); err != nil {
		return err
	}
	fmt.Println("mounted")
	select {}
}

// helpAskSelf mounts, asks its own mount, and gets no answer.
func helpAskSelf(args []string) error {
	m, err := newMemory(1 << 20)
	if err != nil {
		return err
	}
	d, err := Mount(context.Background(), stuck{m}, args[0], Options{})
	if err != nil {
		return err
	}
	return d.fs.self.Load().with(unix.O_RDONLY, fsync)
}

// stuck says so when it is synced, and stays there.
type stuck struct{ memferry.Backend }

func (s stuck) Sync() error {
	fmt.Println("syncing")
	select {}
}

// helpSelfMount mounts as whoever it runs as and has a child of its own use
// the file.
func helpSelfMount(args []string) error {
	m, err := newMemory(4 << 20)
	if err != nil {
		return err
	}
	defer m.Close()
	d, err := Mount(context.Background(), viewer{m}, args[0], Options{Name: "x"})
	if err != nil {
		return err
	}
	cmd := exec.Command(args[1], d.Path(), "1")
	cmd.Env = append(os.Environ(), envHelper+"=readwrite")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	if got, sum := strings.TrimSpace(string(out)), fmt.Sprintf("%x", sha256.Sum256(m.mem)); got != sum {
		return fmt.Errorf("memory and file differ after %d writes", m.writes.Load())
	}
	return nil
}

// mountAt mounts b and sees to it that nothing is left.
func mountAt(t *testing.T, b memferry.Backend, path string, o Options) *Device {
	t.Helper()
	testenv.FUSE(t)
	d, err := Mount(context.Background(), b, path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
			d.Abort() //nolint:errcheck // already failed
		}
		if stillMounted(d.target.path) {
			t.Errorf("%s is left mounted", d.target.path)
		}
	})
	return d
}

func newTestMemory(t *testing.T, size int64) *memory {
	t.Helper()
	m, err := newMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n := m.views.Load(); n != 0 {
			t.Errorf("%d views are left", n)
		}
		m.Close()
	})
	return m
}
