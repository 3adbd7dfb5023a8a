// Package testenv lets a test say what it needs of the machine, and ends it
// with the name of the thing and the remedy where that is missing.
//
// What can be installed (programs, root, FUSE) only skips on a developer's
// machine: with MEMFERRY_CI=1 in the environment its absence fails the test,
// so that a CI run never loses a test silently. What the running kernel does
// not have can't be installed and always skips.
package testenv

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// EnvCI names the variable that turns a skip for an installable thing into
	// a failure when it is "1".
	EnvCI = "MEMFERRY_CI"
	// EnvSeed names the variable that overrides what [Seed] returns.
	EnvSeed = "MEMFERRY_SEED"
	// EnvVM names the variable that is "1" in the machine of `make test-vm`,
	// whose kernel has what it is there for.
	EnvVM = "MEMFERRY_VM"

	installer = "scripts/install-test-deps"
)

// NoSkip reports whether the absence of an installable thing must fail.
func NoSkip() bool { return os.Getenv(EnvCI) == "1" }

// missing ends the test for want of something that can be installed.
func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	msg := fmt.Sprintf(format, args...)
	if NoSkip() {
		t.Fatalf("%s (%s=1 forbids skipping)", msg, EnvCI)
	}
	t.Skip(msg)
}

// Root needs the test to run as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "needs root: run the tests as root, for example `sudo make test`")
	}
}

// Program needs an executable in PATH, and returns where it is.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, "needs the program %q: run %s", name, installer)
	}
	return path
}

// FUSE needs to be able to mount a FUSE file system.
func FUSE(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		missing(t, "needs /dev/fuse: load the kernel's fuse module, or give the container the device (--device /dev/fuse)")
		return
	case err != nil:
		missing(t, "needs /dev/fuse: %v: run the tests as root or make the device accessible", err)
		return
	}
	f.Close() //nolint:errcheck // opened only to see that it opens
	if os.Geteuid() != 0 {
		Program(t, "fusermount3")
	}
}

// Kernel needs a feature of the running kernel, one of those in probes.
func Kernel(t testing.TB, feature string) {
	t.Helper()
	probe, ok := probes[feature]
	if !ok {
		t.Fatalf("testenv: no probe for the kernel feature %q", feature)
	}
	if err := probe(); err != nil {
		t.Skipf("needs the kernel feature %q: %v", feature, err)
	}
}

// Module needs a kernel driver, loaded or built in.
func Module(t testing.TB, name string) {
	t.Helper()
	if _, err := os.Stat(filepath.Join("/sys/module", name)); err != nil {
		t.Skipf("needs the kernel driver %q: run `modprobe %s` on a kernel that has it", name, name)
	}
}

// NBD needs to be able to make nbd block devices: this kernel's, or the one
// that `make test-vm` boots.
func NBD(t testing.TB) {
	t.Helper()
	blockDriver(t, "nbd", "/sys/module/nbd")
}

// Ublk is NBD for ublk block devices.
func Ublk(t testing.TB) {
	t.Helper()
	blockDriver(t, "ublk_drv", "/dev/ublk-control")
}

func blockDriver(t testing.TB, name, sign string) {
	t.Helper()
	_, err := os.Stat(sign)
	switch {
	case err == nil:
		Root(t)
	case os.Getenv(EnvVM) == "1":
		t.Fatalf("needs the kernel driver %q, which the virtual machine should have: %v", name, err)
	default:
		t.Skipf("needs the kernel driver %q: `make test-vm` runs this on a kernel that has it", name)
	}
}

// Seed returns the seed for the test's randomness and logs it, so that a
// failure can be repeated with MEMFERRY_SEED.
func Seed(t testing.TB) int64 {
	t.Helper()
	seed := rand.Int64()
	if s := os.Getenv(EnvSeed); s != "" {
		var err error
		if seed, err = strconv.ParseInt(s, 10, 64); err != nil {
			t.Fatalf("%s=%q is not a number", EnvSeed, s)
		}
	}
	t.Logf("seed %d (repeat with %s=%d)", seed, EnvSeed, seed)
	return seed
}

// Rand returns a source of randomness from [Seed].
func Rand(t testing.TB) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(uint64(Seed(t)), 0))
}

// maxSocketPath is what fits into sockaddr_un (unix(7)), less the final zero.
const maxSocketPath = 107

// TempSocket returns the path of a UNIX socket that does not exist yet, in a
// directory of its own that is removed after the test. Unlike t.TempDir, whose
// paths hold the test's name, it is short enough for sockaddr_un.
func TempSocket(t testing.TB) string {
	t.Helper()
	parent := os.TempDir()
	if len(parent) > maxSocketPath-32 {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "mf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "s")
}

// Tmpfs mounts a memory file system of the given size for the test and returns
// its mountpoint. It needs root.
func Tmpfs(t testing.TB, size int64) string {
	t.Helper()
	Root(t)
	dir := t.TempDir()
	if err := unix.Mount("memferry-test", dir, "tmpfs", 0, "size="+strconv.FormatInt(size, 10)); err != nil {
		missing(t, "needs to mount a tmpfs: %v: give the container CAP_SYS_ADMIN", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// Deadline returns a context that ends after d, and in any case a little before
// the test binary's own timeout, so that a hang is reported by the code that
// hangs. Use generous values: it is there to catch hangs, not to time code.
func Deadline(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	end := time.Now().Add(d)
	if tt, ok := t.(interface{ Deadline() (time.Time, bool) }); ok {
		if limit, ok := tt.Deadline(); ok && limit.Add(-2*time.Second).Before(end) {
			end = limit.Add(-2 * time.Second)
		}
	}
	ctx, cancel := context.WithDeadline(t.Context(), end)
	t.Cleanup(cancel)
	return ctx
}
