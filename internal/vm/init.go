package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

const manifestFile = "/memferry.json"

// IsInit tells whether this process is the machine's first.
func IsInit() bool {
	_, err := os.Stat(manifestFile)
	return err == nil && os.Getpid() == 1
}

// initFailed is the status of a machine that did not get as far as its program.
const initFailed = 125

// Init is the life of the machine. It does not return.
func Init() {
	status, err := guest()
	if err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
		status = initFailed
	}
	if f, err := openPort(portResult); err == nil {
		fmt.Fprintln(f, status)
		f.Close()
	} else {
		fmt.Fprintln(os.Stderr, "init:", err)
	}
	unix.Sync()
	fmt.Fprintln(os.Stderr, "init:", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	select {}
}

func guest() (int, error) {
	if err := mountAll(); err != nil {
		return 0, err
	}
	text, err := os.ReadFile(manifestFile)
	if err != nil {
		return 0, err
	}
	var m manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return 0, err
	}
	for _, name := range m.Modules {
		if err := loadModule(name); err != nil {
			return 0, err
		}
	}
	if err := loopbackUp(); err != nil {
		return 0, err
	}
	return runProgram(m)
}

func mountAll() error {
	for _, m := range []struct{ kind, dir, data string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"devpts", "/dev/pts", ""},
		{"tmpfs", "/dev/shm", ""},
		{"tmpfs", "/tmp", "size=100%"},
		{"tmpfs", "/run", ""},
		{"debugfs", "/sys/kernel/debug", ""},
	} {
		_ = os.Mkdir(m.dir, 0o755)
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2",
	} {
		if err := os.Symlink(target, name); err != nil {
			return err
		}
	}
	return os.Chmod("/tmp", 0o777|os.ModeSticky)
}

func loadModule(name string) error {
	f, err := os.Open(filepath.Join("/modules", name))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), parameters[name], 0); err != nil {
		return fmt.Errorf("load the module %s: %w", name, err)
	}
	return nil
}

// loopbackUp sets the interface lo up (netdevice(7)).
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// openPort opens a serial port that passes on each byte as it is.
func openPort(name string) (*os.File, error) {
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err == nil {
		t.Oflag &^= unix.OPOST
		t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
		err = unix.IoctlSetTermios(fd, unix.TCSETS, t)
	}
	if err != nil {
		unix.Close(fd) //nolint:errcheck // nothing was written
		return nil, fmt.Errorf("%s: set its mode: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// runProgram runs what the manifest says and returns its exit status.
func runProgram(m manifest) (int, error) {
	argv := append([]string{m.Program}, m.Args...)
	attr := &os.ProcAttr{
		Dir:   guestDir,
		Env:   append([]string{"PATH=" + searchPath, "HOME=/root", "TMPDIR=/tmp", "TERM=linux", "LC_ALL=C.UTF-8"}, m.Env...),
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	}
	if m.Program == "" {
		// A terminal of its own, so that ^C works.
		argv = []string{"/bin/sh", "-c", "exec setsid -c sh -l <" + portConsole + " >" + portConsole + " 2>&1"}
	} else {
		out, err := openPort(portOut)
		if err != nil {
			return 0, err
		}
		defer out.Close()
		null, err := os.Open(os.DevNull)
		if err != nil {
			return 0, err
		}
		defer null.Close()
		attr.Files = []*os.File{null, out, out}
	}
	signal.Ignore(syscall.SIGINT) // ^C is the shell's
	p, err := os.StartProcess(argv[0], argv, attr)
	if err != nil {
		return 0, err
	}
	return reap(p.Pid)
}

// reap waits for the process pid, and for all orphans meanwhile.
func reap(pid int) (int, error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case got != pid || !ws.Exited() && !ws.Signaled():
		case ws.Signaled():
			return 128 + int(ws.Signal()), nil
		default:
			return ws.ExitStatus(), nil
		}
	}
}
