package fuse

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDeviceErrorsNameTheRemedy(t *testing.T) {
	for err, remedy := range map[error]string{
		unix.ENOENT: "; load the driver with `modprobe fuse`, or give",
		unix.ENODEV: "; load it with `modprobe fuse`",
		unix.ENXIO:  "; load it with `modprobe fuse`",
		unix.EACCES: "; let this user open it",
		unix.EPERM:  "; let this user open it",
	} {
		got := deviceError(&os.PathError{Op: "open", Path: "/dev/fuse", Err: err})
		if !errors.Is(got, err) || !strings.Contains(got.Error(), remedy) || strings.Count(got.Error(), "; ") != 1 {
			t.Errorf("%v: %v, want %q in it, and no other remedy", err, got, remedy)
		}
	}
}

func TestHelperErrorIsItsWords(t *testing.T) {
	failed := errors.New("exit status 1")
	got := helperError(target{path: "/mnt/x"}, "/bin/fusermount3", failed, "fusermount3: mount failed: Operation not permitted\n")
	if !errors.Is(got, failed) || !strings.Contains(got.Error(), "mount /mnt/x: fusermount3: mount failed: Operation not permitted: exit status 1; ") {
		t.Errorf("got %v", got)
	}
	if got := helperError(target{path: "/mnt/x"}, "/bin/fusermount3", failed, ""); !strings.HasPrefix(got.Error(), "mount /mnt/x: fusermount3: exit status 1; ") {
		t.Errorf("a silent helper: %v", got)
	}
}
