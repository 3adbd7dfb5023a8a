package fuse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// hiddenPrefix names the private directories on which file systems are
	// mounted until their file is bound to its place.
	hiddenPrefix = "memferry-mount-"

	// maxSwept bounds how many of them, left by dead processes, one mount
	// removes, and sweepTimeout how long it looks.
	maxSwept     = 16
	sweepTimeout = time.Second

	// hiddenTries is how often a directory is made anew that another mount's
	// sweep took for a dead one's, between its making and its locking.
	hiddenTries = 4
)

// hiddenDir is a private directory, locked for as long as its owner lives.
type hiddenDir struct {
	path string
	lock int // descriptor of the directory itself, under the mount
}

// makeHidden makes one, after it has swept what dead processes left.
func makeHidden(parent string) (hiddenDir, error) {
	sweepHidden(parent)
	for range hiddenTries {
		path, err := os.MkdirTemp(parent, hiddenPrefix)
		if err != nil {
			return hiddenDir{}, err
		}
		fd, err := lockDirectory(path)
		if err == nil {
			return hiddenDir{path, fd}, nil
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EWOULDBLOCK) {
			os.Remove(path) //nolint:errcheck // an earlier error is being returned
			return hiddenDir{}, err
		}
	}
	return hiddenDir{}, fmt.Errorf("private directory in %s: removed again and again: %w", parent, os.ErrNotExist)
}

// unlock gives the lock up, which a kill does as well.
func (h *hiddenDir) unlock() { unix.Close(h.lock) } //nolint:errcheck // nothing was written

// lockDirectory locks the directory at path, if nobody else has. It fails with
// os.ErrNotExist where the directory was removed meanwhile.
func lockDirectory(path string) (int, error) {
	fd, err := openRetry(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err != nil {
		return -1, err
	}
	err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err == nil && st.Nlink == 0 {
		err = os.ErrNotExist
	}
	if err != nil {
		unix.Close(fd) //nolint:errcheck // nothing was written
		return -1, err
	}
	return fd, nil
}

// sweepHidden removes the private directories in parent whose owner is dead.
// Others' errors are not this mount's: what can't be removed stays.
func sweepHidden(parent string) {
	f, err := os.Open(parent)
	if err != nil {
		return
	}
	defer f.Close() //nolint:errcheck // opened for reading
	names, _ := f.Readdirnames(-1)
	end, swept := time.Now().Add(sweepTimeout), 0
	for _, name := range names {
		if swept == maxSwept || time.Now().After(end) {
			return
		}
		if strings.HasPrefix(name, hiddenPrefix) && sweepOne(filepath.Join(parent, name), time.Until(end)) {
			swept++
		}
	}
}

// sweepOne removes a directory if nothing alive is mounted on it and nobody
// has it locked.
func sweepOne(path string, patience time.Duration) bool {
	mounts, err := mountsAt(path)
	if err != nil {
		return false
	}
	for _, m := range mounts {
		if !m.ours() || answers(path, patience) || detach(path) != nil {
			return false
		}
	}
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() {
		return false
	}
	fd, err := lockDirectory(path)
	if err != nil {
		return false
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	return unix.Rmdir(path) == nil
}
