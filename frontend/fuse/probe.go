package fuse

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

// Features tell what this machine can do. A nil error means that it can;
// otherwise the error says why not and what would help.
type Features struct {
	// Mount is being able to mount at all.
	Mount error
	// Direct is mounting by the system call; it gives files as mountpoints the
	// write-back cache, and read-ahead beyond 128 KiB.
	Direct error
	// Helper is mounting by fusermount3, without root.
	Helper error
	// Passthrough is reads by the kernel alone (read-only mounts).
	Passthrough error
}

// Probe looks, without mounting anything.
func Probe() Features {
	var f Features
	f.Direct = probeDirect()
	f.Helper = probeHelper()
	if f.Direct != nil && f.Helper != nil {
		f.Mount = f.Helper // which names root as well
	}
	f.Passthrough = probePassthrough(f.Direct)
	return f
}

// openDevice opens /dev/fuse and closes it again.
func openDevice() error {
	fd, err := openRetry("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC)
	if err == nil {
		err = unix.Close(fd)
	}
	if err != nil {
		return deviceError(err)
	}
	return nil
}

func probeDirect() error {
	if err := openDevice(); err != nil {
		return err
	}
	if !mayMount() {
		return fmt.Errorf("mounting directly needs root (CAP_SYS_ADMIN): %w", memferry.ErrNotSupported)
	}
	return nil
}

// mayMount reports whether CAP_SYS_ADMIN is effective (capget(2)).
func mayMount() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return os.Geteuid() == 0
	}
	return data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

func probeHelper() error {
	// The helper is root, so that our own permissions do not matter.
	if err := openDevice(); err != nil && !errors.Is(err, os.ErrPermission) {
		return err
	}
	_, err := helperPath()
	return err
}

func probePassthrough(direct error) error {
	if direct != nil {
		return fmt.Errorf("passthrough needs a direct mount: %w", direct)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil || major < 6 || major == 6 && minor < 9 {
		return fmt.Errorf("passthrough needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH, this is %s: %w", release, memferry.ErrNotSupported)
	}
	return nil
}
