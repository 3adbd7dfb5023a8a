package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

func TestUnmountedFromOutside(t *testing.T) {
	for place, path := range places {
		for _, flag := range []string{"", "-l", "-f"} {
			t.Run(place+flag, func(t *testing.T) {
				testenv.Root(t)
				m := newTestMemory(t, testSize)
				d := mountAt(t, m, path(t), Options{})
				args := []string{d.target.path}
				if flag != "" {
					args = append(args, flag)
				}
				if out, err := exec.Command("umount", args...).CombinedOutput(); err != nil {
					t.Fatalf("umount: %v: %s", err, out)
				}
				ctx, cancel := context.WithTimeout(context.Background(), hang)
				defer cancel()
				if err := d.Wait(ctx); err != nil {
					t.Error(err)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	d := mountAt(t, newTestMemory(t, testSize), t.TempDir(), Options{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := d.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestBusy(t *testing.T) {
	for place, path := range places {
		t.Run(place, func(t *testing.T) {
			d := mountAt(t, newTestMemory(t, testSize), path(t), Options{})
			cmd, in, _ := start(t, "hold", d.Path())
			err := d.Close()
			if !errors.Is(err, memferry.ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint("pid ", cmd.Process.Pid)) {
				t.Errorf("close of a file in use: %v", err)
			}
			if got := run(t, "read", d.Path(), "0"); !strings.HasSuffix(got, "\n0") {
				t.Errorf("after a close that failed: %q", got)
			}
			in.Close()
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDetach(t *testing.T) {
	m := newTestMemory(t, testSize)
	d := mountAt(t, m, t.TempDir(), Options{})
	cmd, in, _ := start(t, "hold", d.Path())
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	if stillMounted(d.target.path) {
		t.Error("still mounted")
	}
	before := m.reads.Load()
	fmt.Fprintln(in, 50*4096)
	for i := 0; m.reads.Load() == before && i < 1000; i++ {
		time.Sleep(10 * time.Millisecond)
	}
	if m.reads.Load() == before || d.over() {
		t.Error("the holder was cut off")
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	if err := d.Wait(ctx); err != nil {
		t.Error(err)
	}
}

func TestAbortCancelsRequests(t *testing.T) {
	testenv.Root(t)
	s := newSlow(newTestMemory(t, testSize), 100)
	d := mountAt(t, s, t.TempDir(), Options{})
	cmd := helper(t, "read", d.Path(), "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	receive(t, "read", s.held)
	if err := d.Abort(); err != nil && !errors.Is(err, memferry.ErrInUse) {
		t.Error(err)
	}
	receive(t, "cancellation", s.canceled)
	cmd.Wait() //nolint:errcheck // whatever it makes of it
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	if err := d.Wait(ctx); err != nil {
		t.Error(err)
	}
}

func TestFlushOnClose(t *testing.T) {
	m := newTestMemory(t, testSize)
	d := mountAt(t, m, t.TempDir(), Options{})
	f, err := d.File()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("written"), 5000); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if string(m.mem[5000:5007]) != "written" || m.syncs.Load() == 0 {
		t.Errorf("backend holds %q after %d syncs", m.mem[5000:5007], m.syncs.Load())
	}
}

func TestCloseReportsAFailedSync(t *testing.T) {
	m := newTestMemory(t, testSize)
	d, err := Mount(context.Background(), m, t.TempDir(), Options{})
	testenv.FUSE(t)
	if err != nil {
		t.Fatal(err)
	}
	m.setError(memferry.ErrTimeout)
	for range 2 {
		if err := d.Close(); !errors.Is(err, unix.EIO) {
			t.Errorf("got %v, want an EIO", err)
		}
	}
	if stillMounted(d.target.path) {
		t.Error("still mounted")
	}
}

func TestStaleMountIsCleared(t *testing.T) {
	for place, path := range places {
		t.Run(place, func(t *testing.T) {
			testenv.FUSE(t)
			path := path(t)
			for range 2 { // two of them, one upon the other
				cmd, _, said := start(t, "serve", path)
				if said != "mounted" {
					t.Fatal(said)
				}
				if cleared, err := ClearStale(path); cleared || !errors.Is(err, memferry.ErrInUse) {
					t.Fatalf("a live mount: %v, %v", cleared, err)
				}
				if _, err := Mount(context.Background(), newTestMemory(t, 4096), path, Options{}); !errors.Is(err, memferry.ErrInUse) {
					t.Fatalf("mount upon a live mount: %v", err)
				}
				cmd.Process.Kill() //nolint:errcheck // it runs
				cmd.Wait()         //nolint:errcheck // it was killed
			}
			d := mountAt(t, newTestMemory(t, testSize), path, Options{})
			run(t, "read", d.Path(), "1")
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if cleared, err := ClearStale(path); cleared || err != nil {
				t.Errorf("nothing stale: %v, %v", cleared, err)
			}
		})
	}
}

func TestForeignMountIsLeftAlone(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, "size=4k"); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) }) //nolint:errcheck // a test's
	_, err := Mount(context.Background(), newTestMemory(t, 4096), dir, Options{})
	if !errors.Is(err, memferry.ErrInUse) || !strings.Contains(err.Error(), "tmpfs") {
		t.Errorf("got %v", err)
	}
	if !stillMounted(dir) {
		t.Error("it was unmounted")
	}
}

func TestBadMountpoints(t *testing.T) {
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m := newTestMemory(t, 4096)
	for name, c := range map[string]struct {
		path string
		want error
	}{
		"full directory": {full, memferry.ErrInUse},
		"no parent":      {filepath.Join(full, "a", "b"), os.ErrNotExist},
		"device":         {"/dev/null", nil},
		"below a file":   {filepath.Join(full, "x", "y"), unix.ENOTDIR},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := Mount(context.Background(), m, c.path, Options{})
			if err == nil {
				d.Close()
				t.Fatal("mounted")
			}
			if c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line: %v", err)
			}
		})
	}
}

func TestEmptyBackend(t *testing.T) {
	d := mountAt(t, &memory{data: map[int64]bool{}, closed: true}, t.TempDir(), Options{})
	f, err := d.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := f.ReadAt(make([]byte, 1), 0); n != 0 || err == nil {
		t.Errorf("%d, %v", n, err)
	}
}

func TestUnprivileged(t *testing.T) {
	testenv.Root(t) // to become somebody else
	testenv.FUSE(t)
	for _, p := range []string{"fusermount3", "unshare", "setpriv"} {
		testenv.Program(t, p)
	}
	const nobody = 65534
	for place, path := range places {
		t.Run(place, func(t *testing.T) {
			path := path(t)
			binary := filepath.Join(t.TempDir(), "helper")
			b, err := os.ReadFile(os.Args[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(binary, b, 0o755); err != nil {
				t.Fatal(err)
			}
			for p := path; p != os.TempDir(); p = filepath.Dir(p) {
				os.Chown(p, nobody, nobody) //nolint:errcheck // some don't exist yet
			}
			for p := binary; p != os.TempDir(); p = filepath.Dir(p) {
				if err := os.Chmod(p, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			// A node of our own, in a mount namespace of our own, as the
			// machine's may be for root alone.
			const script = `mknod -m 666 "$0/fuse" c 10 229 && mount --bind "$0/fuse" /dev/fuse &&
				exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"`
			cmd := helperAt(t, "unshare", "selfmount", "-m", "sh", "-c", script, t.TempDir(), binary, path, binary)
			cmd.Dir = "/"
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
			if stillMounted(path) {
				detach(path) //nolint:errcheck // already failed
				t.Error("left mounted")
			}
		})
	}
}
