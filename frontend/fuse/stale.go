package fuse

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

const (
	// answerTimeout is how long a mount may take to answer before it counts
	// as in use by a process that hangs.
	answerTimeout = 5 * time.Second

	// maxStacked bounds how many stale mounts on one path are cleared.
	maxStacked = 64
)

// ClearStale removes what a killed process left mounted on path, and reports
// whether there was anything. It touches nothing but mounts of this package
// whose process is gone; where one is alive it fails with memferry.ErrInUse.
func ClearStale(path string) (bool, error) {
	path, err := resolve(path)
	if err != nil {
		return false, err
	}
	cleared := false
	for range maxStacked {
		mounts, err := mountsAt(path)
		if err != nil {
			return cleared, err
		}
		if len(mounts) == 0 {
			if cleared && marked(path) {
				os.Remove(path) //nolint:errcheck // an empty file more does no harm
			}
			return cleared, nil
		}
		top := mounts[len(mounts)-1]
		if !top.ours() {
			return cleared, fmt.Errorf("%s has a file system of type %s mounted on it: %w; choose another path or unmount it",
				path, top.fs, memferry.ErrInUse)
		}
		if alive(path) {
			return cleared, fmt.Errorf("%s is mounted already: %w; run `memferry umount %s` first", path, memferry.ErrInUse, path)
		}
		if err := detach(path); err != nil {
			return cleared, fmt.Errorf("clear stale mount %s: %w", path, err)
		}
		cleared = true
	}
	return cleared, fmt.Errorf("%s has more than %d stale mounts: %w", path, maxStacked, memferry.ErrInUse)
}

// alive reports whether a process answers for the mount on path. It asks by
// statfs, because what stat needs the kernel may still remember. One that does
// not answer in time is alive as well.
func alive(path string) bool { return answers(path, answerTimeout) }

// answers is alive with the time given.
func answers(path string, patience time.Duration) bool {
	answer := make(chan error, 1)
	go func() {
		var st unix.Statfs_t
		answer <- unix.Statfs(path, &st)
	}()
	select {
	case err := <-answer:
		return !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED)
	case <-time.After(patience):
		return true
	}
}

// detach takes a mount off its path, whoever still uses it.
func detach(path string) error { return unmount(path, unix.MNT_DETACH) }

// unmount unmounts path: by the system call where we may, by fusermount3
// otherwise. A busy mount is unix.EBUSY.
func unmount(path string, flags int) error {
	// The last one writes out what the kernel has cached.
	err := outside(func() error { return unix.Unmount(path, flags|unix.UMOUNT_NOFOLLOW) })
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	args := []string{"-u", "-q"}
	if flags&unix.MNT_DETACH != 0 {
		args = append(args, "-z")
	}
	helper, err := helperPath()
	if err != nil {
		return err
	}
	out, err := exec.Command(helper, append(args, "--", path)...).CombinedOutput()
	if err == nil {
		return nil
	}
	msg := strings.TrimSpace(string(out))
	if strings.Contains(msg, "busy") || msg == "" && stillMounted(path) {
		return unix.EBUSY
	}
	return fmt.Errorf("%s: %w: %s", helper, err, msg)
}

func stillMounted(path string) bool {
	mounts, err := mountsAt(path)
	return err == nil && len(mounts) > 0
}
