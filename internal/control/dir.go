// Package control is how one memferry process talks to another: each mount
// listens on a UNIX socket in the user's runtime directory, and `status` and
// `umount` find it there.
//
// The directory belongs to the user and is closed to everybody else; that is
// the whole of the access control. The protocol is HTTP with JSON bodies:
//
//	GET  /status    what the mount does
//	POST /sync      push what is dirty, answer when the remote has it
//	POST /unmount   push, unmount, answer when both are done
package control

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// maxSocketPath is the length of sun_path less its final zero (unix(7)).
const maxSocketPath = 107

// Dirs are the candidates for the runtime directory of user uid, best first.
// Sockets are created in the first that can be used and looked for in all,
// since XDG_RUNTIME_DIR is set in some sessions of a user and not in others.
func Dirs(getenv func(string) string, uid int) []string {
	var dirs []string
	add := func(dir string) {
		if !filepath.IsAbs(dir) || len(dir)+len("/0123456789abcdef.sock") > maxSocketPath {
			return
		}
		for _, d := range dirs {
			if d == dir {
				return
			}
		}
		dirs = append(dirs, dir)
	}
	id := strconv.Itoa(uid)
	if d := getenv("XDG_RUNTIME_DIR"); d != "" {
		add(filepath.Join(d, "memferry"))
	}
	if uid == 0 {
		add("/run/memferry")
	} else {
		add(filepath.Join("/run/user", id, "memferry"))
	}
	add("/tmp/memferry-" + id)
	return dirs
}

// makeDir creates the first of dirs that can be had, and returns it.
func makeDir(dirs []string, uid int) (string, error) {
	var errs []error
	for _, dir := range dirs {
		err := os.Mkdir(dir, 0o700)
		if err == nil || errors.Is(err, fs.ErrExist) {
			err = checkDir(dir, uid)
		}
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", fmt.Errorf("no runtime directory: %w", errors.Join(errs...))
}

// checkDir refuses a directory that another user made or can write to: whoever
// owns it could answer in the place of a mount.
func checkDir(dir string, uid int) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir():
		return fmt.Errorf("%s is not a directory; remove it", dir)
	case !ok || int(st.Uid) != uid:
		return fmt.Errorf("%s belongs to another user; remove it", dir)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s is open to other users; chmod 700 it", dir)
	}
	return nil
}

// socketName is the name of the socket of the mount at an absolute path.
func socketName(mountpoint string) string {
	sum := sha256.Sum256([]byte(mountpoint))
	return hex.EncodeToString(sum[:8]) + ".sock"
}

// lockDir keeps others from creating and clearing sockets in dir; between
// bind(2) and listen(2) a living socket looks dead.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}
