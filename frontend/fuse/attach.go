package fuse

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

// target is where a file system is going to be mounted.
type target struct {
	path    string // resolved
	dir     bool   // a directory; otherwise a regular file
	created bool   // the file was made for us, and goes with the mount
}

// prepareTarget checks the mountpoint, clears what a crash left there, and
// makes a file where there is nothing.
func prepareTarget(path string) (target, error) {
	resolved, err := resolve(path)
	if err != nil {
		return target{}, fmt.Errorf("mountpoint %s: %w", path, err)
	}
	if _, err := ClearStale(resolved); err != nil {
		return target{}, err
	}
	t := target{path: resolved}
	st, err := os.Lstat(resolved)
	switch {
	case errors.Is(err, os.ErrNotExist):
		f, err := os.OpenFile(resolved, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return target{}, fmt.Errorf("mountpoint: %w", err)
		}
		t.created = true
		return t, errors.Join(mark(f), f.Close())
	case err != nil:
		return target{}, fmt.Errorf("mountpoint: %w", err)
	case st.IsDir():
		t.dir = true
		return t, requireEmpty(resolved)
	case !st.Mode().IsRegular():
		return target{}, fmt.Errorf("mountpoint %s is neither a directory nor a regular file", resolved)
	}
	t.created = marked(resolved)
	return t, nil
}

// made is the time of modification of the files that are made to be
// mountpoints. Together with being empty it tells, after a crash, that a file
// goes with its mount: whoever writes to it, or touches it, changes it.
var made = time.Unix(107_846_246, 636_572_727)

// mark makes f known as made for a mount. Where the file system does not keep
// the time, the file stays after a crash.
func mark(f *os.File) error { return os.Chtimes(f.Name(), made, made) }

func marked(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode().IsRegular() && st.Size() == 0 && st.ModTime().Equal(made)
}

func requireEmpty(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("mountpoint: %w", err)
	}
	defer f.Close() //nolint:errcheck // opened for reading
	if names, _ := f.Readdirnames(1); len(names) > 0 {
		return fmt.Errorf("mountpoint %s is not empty: %w; choose an empty directory or a file", dir, memferry.ErrInUse)
	}
	return nil
}

// remove takes away the file made by prepareTarget, unless someone has put
// something there.
func (t target) remove() {
	if !t.created {
		return
	}
	if st, err := os.Lstat(t.path); err == nil && st.Mode().IsRegular() && st.Size() == 0 && !stillMounted(t.path) {
		os.Remove(t.path) //nolint:errcheck // an empty file more does no harm
	}
}

// attachment is a mounted file system that nobody serves yet.
type attachment struct {
	fd int // of /dev/fuse
	// hidden is the private directory it is mounted on, when the file in it is
	// to be bound to the target.
	hidden hiddenDir
	// fileRoot says that the root is the file itself.
	fileRoot bool
}

// attach mounts: by the system call where we may, by fusermount3 otherwise. A
// file's place can be taken in two ways. By binding there the file of a
// directory that is hidden at once, which needs privileges; or by a file
// system whose root is a file, which needs none but loses the write-back
// cache: the kernel makes that root before it knows our options, and then
// trusts itself for a size (0) that it never learns (fuse_iget and
// fuse_change_attributes in fs/fuse/inode.c).
func attach(t target, o Options) (attachment, error) {
	a, err := attachDirect(t, o)
	if err == nil || o.NoHelper || !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return a, err
	}
	fd, err := attachHelper(t, o)
	if err != nil {
		return attachment{}, err
	}
	return attachment{fd: fd, fileRoot: !t.dir}, nil
}

func attachDirect(t target, o Options) (attachment, error) {
	fd, err := openRetry("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC)
	if err != nil {
		return attachment{}, deviceError(err)
	}
	a := attachment{fd: fd}
	point := t.path
	if !t.dir {
		if a.hidden, err = makeHidden(hiddenParent()); err != nil {
			unix.Close(fd) //nolint:errcheck // nothing was done with it
			return attachment{}, fmt.Errorf("mount: %w", err)
		}
		point = a.hidden.path
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if o.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,max_read=%d,default_permissions",
		fd, os.Geteuid(), os.Getegid(), maxRequest)
	if o.AllowOther {
		data += ",allow_other"
	}
	if err := unix.Mount(fsSubtype, point, fsType, flags, data); err != nil {
		a.discard()
		return attachment{}, fmt.Errorf("mount %s: %w", t.path, err)
	}
	return a, nil
}

// hiddenParent is where private directories are made: out of the way, and
// emptied at boot.
func hiddenParent() string {
	if unix.Access("/run", unix.W_OK) == nil {
		return "/run"
	}
	return os.TempDir()
}

// reveal binds the file to the target and hides the directory again. The
// binding alone keeps the file system mounted, so that unmounting it ends
// everything.
func (a *attachment) reveal(t target, name string) error {
	if a.hidden.path == "" {
		return nil
	}
	err := outside(func() error { return unix.Mount(filepath.Join(a.hidden.path, name), t.path, "", unix.MS_BIND, "") })
	if err != nil {
		return fmt.Errorf("bind to %s: %w", t.path, err)
	}
	return a.hide()
}

// hide detaches the private directory.
func (a *attachment) hide() error {
	if a.hidden.path == "" {
		return nil
	}
	err := outside(func() error { return unix.Unmount(a.hidden.path, unix.MNT_DETACH) })
	if errors.Is(err, unix.EINVAL) {
		err = nil // not mounted
	}
	if err == nil {
		err = os.Remove(a.hidden.path)
	}
	if err != nil {
		return fmt.Errorf("hide %s: %w", a.hidden.path, err)
	}
	a.hidden.unlock()
	a.hidden = hiddenDir{}
	return nil
}

// discard gives up an attachment that is not served.
func (a *attachment) discard() {
	unix.Close(a.fd) //nolint:errcheck // ends the connection
	a.hide()         //nolint:errcheck // an earlier error is being returned
}

func helperPath() (string, error) {
	for _, name := range []string{"fusermount3", "fusermount", "/bin/fusermount3"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("mounting without root needs fusermount3: %w; install the package fuse3, or run as root (CAP_SYS_ADMIN)", exec.ErrNotFound)
}

// deviceError explains why /dev/fuse can't be opened.
func deviceError(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no /dev/fuse: %w; load the driver with `modprobe fuse`, or give the container the device (--device /dev/fuse)", err)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("/dev/fuse has no driver: %w; load it with `modprobe fuse`", err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("/dev/fuse: %w; let this user open it (`chmod 666 /dev/fuse` as root, as udev does), or give the container the device", err)
	}
	return fmt.Errorf("/dev/fuse: %w", err)
}

// attachHelper lets fusermount3 mount (its manual page; the descriptor comes
// back over the socket that _FUSE_COMMFD names).
func attachHelper(t target, o Options) (int, error) {
	helper, err := helperPath()
	if err != nil {
		return -1, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount3"), os.NewFile(uintptr(pair[1]), "fusermount3")
	defer ours.Close() //nolint:errcheck // only ever received from
	options := []string{
		"fsname=" + fsSubtype, "subtype=" + fsSubtype, "default_permissions",
		fmt.Sprintf("max_read=%d", maxRequest),
	}
	if o.ReadOnly {
		options = append(options, "ro")
	}
	if o.AllowOther {
		options = append(options, "allow_other")
	}
	cmd := exec.Command(helper, "-o", strings.Join(options, ","), "--", t.path)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	out, err := cmd.CombinedOutput()
	theirs.Close() //nolint:errcheck // the helper's end
	if err != nil {
		return -1, helperError(t, helper, err, string(out))
	}
	return receiveDescriptor(ours)
}

// helperError says why the helper could not mount, in its own words.
func helperError(t target, helper string, err error, said string) error {
	if said = strings.TrimSpace(said); said == "" {
		said = filepath.Base(helper)
	}
	return fmt.Errorf("mount %s: %s: %w; run as root, or in a container give it /dev/fuse and CAP_SYS_ADMIN", t.path, said, err)
}

func receiveDescriptor(f *os.File) (int, error) {
	conn, err := net.FileConn(f)
	if err != nil {
		return -1, err
	}
	defer conn.Close() //nolint:errcheck // only ever received from
	var data [8]byte
	control := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(data[:], control)
	if err != nil {
		return -1, fmt.Errorf("receive from fusermount3: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("receive from fusermount3: %d messages: %w", len(messages), errors.Join(err, memferry.ErrCorrupt))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("receive from fusermount3: %d descriptors: %w", len(fds), errors.Join(err, memferry.ErrCorrupt))
	}
	unix.CloseOnExec(fds[0])
	return fds[0], nil
}
