package testenv

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// probes tells, for each feature a test may ask for, why it is missing.
var probes = map[string]func() error{
	"memfd":            probeMemfd,
	"userfaultfd":      probeUserfaultfd,
	"uffd-poison":      func() error { return probeRelease(6, 6) },
	"fuse-passthrough": func() error { return probeRelease(6, 9) },
	"fuse-mmap-direct": func() error { return probeRelease(6, 6) },
	"punch-hole":       probePunchHole,
}

// probeRelease needs a kernel of at least the given version: for features that
// can't be asked for without using them.
func probeRelease(major, minor int) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	var ma, mi int
	if _, err := fmt.Sscanf(release, "%d.%d", &ma, &mi); err != nil {
		return fmt.Errorf("can't read the kernel's version from %q", release)
	}
	if ma < major || ma == major && mi < minor {
		return fmt.Errorf("it needs Linux %d.%d, this is %s", major, minor, release)
	}
	return nil
}

func probeMemfd() error {
	fd, err := unix.MemfdCreate("memferry-probe", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	return unix.Close(fd)
}

func probeUserfaultfd() error {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	switch {
	case errno == unix.EPERM:
		return errors.New("userfaultfd: not permitted: set the sysctl vm.unprivileged_userfaultfd=1 or run as root")
	case errno != 0:
		return fmt.Errorf("userfaultfd: %w", errno)
	}
	return unix.Close(int(fd))
}

func probePunchHole() error {
	f, err := os.CreateTemp("", "memferry-probe")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) //nolint:errcheck // a temporary file
	defer f.Close()           //nolint:errcheck // nothing was written
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
	if err != nil {
		return fmt.Errorf("fallocate(PUNCH_HOLE) in %s: %w", os.TempDir(), err)
	}
	return nil
}
