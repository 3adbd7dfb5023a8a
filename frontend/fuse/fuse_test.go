package fuse

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

const testSize = 8 << 20

// places are the kinds of mountpoints.
var places = map[string]func(t *testing.T) string{
	"directory": func(t *testing.T) string { return t.TempDir() },
	"file": func(t *testing.T) string {
		p := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(p, []byte("underneath"), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	},
	"nothing": func(t *testing.T) string { return filepath.Join(t.TempDir(), "a name\\with blanks") },
}

func TestReadWrite(t *testing.T) {
	for place, path := range places {
		for _, kind := range []string{"plain", "viewer"} {
			t.Run(place+"/"+kind, func(t *testing.T) {
				m := newTestMemory(t, testSize+512)
				var b memferry.Backend = m
				if kind == "viewer" {
					b = viewer{m}
				}
				seed := testenv.Seed(t)
				d := mountAt(t, b, path(t), Options{Name: "disk"})
				got := run(t, "readwrite", d.Path(), strconv.FormatInt(seed, 10))
				if sum := fmt.Sprintf("%x", sha256.Sum256(m.mem)); got != sum {
					t.Error("backend and file differ after fsync")
				}
				if m.syncs.Load() == 0 {
					t.Error("fsync did not sync the backend")
				}
				if kind == "viewer" && m.viewed.Load() == 0 {
					t.Error("no read was served by a view")
				}
			})
		}
	}
}

func TestCreatedFileIsRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new")
	d := mountAt(t, newTestMemory(t, testSize), path, Options{})
	if d.Path() != path {
		t.Errorf("path %s, want %s", d.Path(), path)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is left: %v", err)
	}
}

func TestExistingFileIsKept(t *testing.T) {
	path := places["file"](t)
	d := mountAt(t, newTestMemory(t, testSize), path, Options{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "underneath" {
		t.Errorf("the file has become %q, %v", b, err)
	}
}

func TestMmap(t *testing.T) {
	m := newTestMemory(t, testSize+100)
	d := mountAt(t, viewer{m}, t.TempDir(), Options{})
	got := run(t, "mmap", d.Path())
	if sum := fmt.Sprintf("%x", sha256.Sum256(m.mem)); got != sum {
		t.Error("backend and mapping differ after msync")
	}
}

func TestErrnos(t *testing.T) {
	for place, path := range places {
		t.Run(place, func(t *testing.T) {
			d := mountAt(t, newTestMemory(t, testSize), path(t), Options{})
			run(t, "errnos", d.Path(), strconv.FormatBool(d.fs.writeBack))
		})
	}
}

func TestOneFileOnly(t *testing.T) {
	d := mountAt(t, newTestMemory(t, testSize), t.TempDir(), Options{Name: "one"})
	dir := filepath.Dir(d.Path())
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "one" {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
	run(t, "strangers", dir, "one")
}

func TestSeek(t *testing.T) {
	d := mountAt(t, newTestMemory(t, testSize), t.TempDir(), Options{})
	run(t, "seek", d.Path())
}

func TestReadOnly(t *testing.T) {
	for place, path := range places {
		t.Run(place, func(t *testing.T) {
			d := mountAt(t, newTestMemory(t, testSize), path(t), Options{ReadOnly: true})
			run(t, "readonly", d.Path())
		})
	}
}

func TestExecuteFromMount(t *testing.T) {
	binary, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"view", "passthrough"} {
		t.Run(kind, func(t *testing.T) {
			m := newTestMemory(t, int64(len(binary)))
			copy(m.mem, binary)
			var b memferry.Backend = viewer{m}
			if kind == "passthrough" {
				b = filer{m}
			}
			d := mountAt(t, b, t.TempDir(), Options{ReadOnly: true})
			out, err := helperAt(t, d.Path(), "hello").CombinedOutput()
			if err != nil || strings.TrimSpace(string(out)) != "hello from the mount" {
				t.Errorf("%s, %v", out, err)
			}
		})
	}
}

func TestErrorsReachTheApplication(t *testing.T) {
	for _, c := range []struct {
		err         error
		read, write string
	}{
		{memferry.ErrTimeout, "EIO", "EIO"},
		{memferry.ErrChanged, "ESTALE", "ESTALE"},
		{memferry.ErrNoSpace, "ENOSPC", "ENOSPC"},
		{memferry.ErrClosed, "EIO", "EIO"},
	} {
		t.Run(c.err.Error(), func(t *testing.T) {
			m := newTestMemory(t, testSize)
			d := mountAt(t, m, t.TempDir(), Options{})
			m.setError(fmt.Errorf("test: %w", c.err))
			if got := run(t, "read", d.Path(), "5"); !strings.HasSuffix(got, "\n"+c.read) {
				t.Errorf("read: %q, want %s", got, c.read)
			}
			m.setError(nil)
			if got := run(t, "read", d.Path(), "0"); !strings.HasSuffix(got, "\n0") {
				t.Errorf("read once it works again: %q", got)
			}
			m.setError(fmt.Errorf("test: %w", c.err))
			if got := run(t, "write", d.Path()); got != c.write {
				t.Errorf("write and fsync: %q, want %s", got, c.write)
			}
			m.setError(nil)
			if got := run(t, "write", d.Path()); got != "ok" {
				t.Errorf("write and fsync once it works again: %q", got)
			}
		})
	}
}

// receive waits for ch within reason.
func receive(t *testing.T, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(hang):
		t.Fatalf("%s: nothing happened", what)
	}
}

func TestSlowReadsBlockNoOthers(t *testing.T) {
	s := newSlow(newTestMemory(t, testSize), 100)
	d := mountAt(t, s, t.TempDir(), Options{})
	const readers = 20
	var all sync.WaitGroup
	for range readers {
		fd, err := openRetry(d.Path(), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			defer unix.Munmap(page) //nolint:errcheck // a test's
			defer unix.Close(fd)    //nolint:errcheck // a test's
			if n, err := unix.Pread(fd, page, 100*4096); n != 4096 || err != nil {
				t.Errorf("slow read: %d, %v", n, err)
			}
		})
	}
	for range readers {
		receive(t, "slow read", s.held)
	}
	if got := run(t, "read", d.Path(), "1500"); !strings.HasSuffix(got, "\n0") {
		t.Errorf("read beside %d slow ones: %q", readers, got)
	}
	close(s.release)
	all.Wait()
}

func TestSignalsDoNotInterrupt(t *testing.T) {
	for _, way := range []string{"read", "mapread"} {
		t.Run(way, func(t *testing.T) {
			m := newTestMemory(t, testSize)
			m.mem[100*4096] = 42
			s := newSlow(m, 100)
			d := mountAt(t, s, t.TempDir(), Options{})
			cmd := helper(t, way, d.Path(), "100")
			var out strings.Builder
			cmd.Stdout = &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			receive(t, "read", s.held)
			for range 5 {
				if err := cmd.Process.Signal(unix.SIGUSR1); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * killPoll)
			}
			close(s.release)
			if err := cmd.Wait(); err != nil || !strings.HasSuffix(strings.TrimSpace(out.String()), "\n42") {
				t.Errorf("%v: %q", err, out.String())
			}
			if len(s.canceled) > 0 {
				t.Error("the read was cancelled")
			}
		})
	}
}

func TestKilledReaderCancels(t *testing.T) {
	for _, sig := range []syscall.Signal{unix.SIGKILL, unix.SIGTERM} {
		t.Run(unix.SignalName(sig), func(t *testing.T) {
			s := newSlow(newTestMemory(t, testSize), 100)
			d := mountAt(t, s, t.TempDir(), Options{})
			cmd := exec.Command("dd", "if="+d.Path(), "of=/dev/null", "bs=4096", "skip=100", "count=1", "iflag=direct")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			receive(t, "read", s.held)
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			receive(t, "cancellation", s.canceled)
			if err := cmd.Wait(); err == nil {
				t.Error("the reader ended well")
			}
		})
	}
}

func TestPassthrough(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "fuse-passthrough")
	m := newTestMemory(t, testSize)
	m.mem[5*4096] = 7
	d := mountAt(t, filer{m}, t.TempDir(), Options{})
	if got := run(t, "read", d.Path(), "5"); !strings.HasSuffix(got, "\n7") {
		t.Errorf("read: %q", got)
	}
	if got := run(t, "mapread", d.Path(), "5"); !strings.HasSuffix(got, "\n7") {
		t.Errorf("mapped read: %q", got)
	}
	run(t, "readonly", d.Path())
	if !d.Passthrough() {
		t.Error("passthrough is not used")
	}
	if n := m.reads.Load(); n != 0 {
		t.Errorf("%d reads came through", n)
	}
}

func TestPassthroughStartsOncePulled(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "fuse-passthrough")
	p := &pulled{memory: newTestMemory(t, testSize)}
	for i := range p.mem {
		p.mem[i] = byte(i / 4096)
	}
	d := mountAt(t, p, t.TempDir(), Options{})
	ask := func(page int) string { return run(t, "read", d.Path(), strconv.Itoa(page)) }

	cmd, in, _ := start(t, "hold", d.Path())
	if got := ask(3); !strings.HasSuffix(got, "\n3") {
		t.Errorf("before the pull is complete: %q", got)
	}
	p.complete.Store(true)
	if got := ask(1900 % 256); !strings.HasSuffix(got, "\n108") || d.Passthrough() {
		t.Errorf("beside an older handle: %q, passthrough %v", got, d.Passthrough())
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	// The kernel tells of the last close a moment later.
	for range 500 {
		if got := ask(4); !strings.HasSuffix(got, "\n4") {
			t.Fatalf("after the last older handle: %q", got)
		}
		if d.Passthrough() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("passthrough never starts")
}

func TestNoPassthrough(t *testing.T) {
	m := newTestMemory(t, testSize)
	for name, c := range map[string]struct {
		b memferry.Backend
		o Options
	}{
		"forbidden":      {filer{m}, Options{NoPassthrough: true}},
		"another size":   {sized{filer{m}}, Options{}},
		"nothing pulled": {&pulled{memory: m}, Options{}},
	} {
		t.Run(name, func(t *testing.T) {
			d := mountAt(t, c.b, t.TempDir(), c.o)
			run(t, "readonly", d.Path())
			if d.Passthrough() {
				t.Error("passthrough is used")
			}
		})
	}
}

// sized is shorter than its file.
type sized struct{ filer }

func (s sized) Size() int64 { return testSize / 2 }
