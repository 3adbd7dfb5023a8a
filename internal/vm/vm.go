package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Config says what to run. The zero value is a shell on the console.
type Config struct {
	// Program is a statically linked one of the host; empty: a shell.
	Program string
	Args    []string
	// Dir is the host's working directory, whose testdata is in that of the
	// machine, guestDir.
	Dir string
	// Env is added to the environment, in the form of os.Environ.
	Env []string
	// Timeout bounds the program's run, in the machine's time, once booted;
	// zero: an hour.
	Timeout time.Duration

	Stdin  io.Reader // of the shell
	Stdout io.Writer
	Stderr io.Writer
}

const (
	memory = "3G"
	cpus   = "2"

	// bootTimeout is how long the machine may take beside what it runs.
	bootTimeout = 2 * time.Minute
	// maxLog bounds what is shown of the kernel's messages.
	maxLog = 16 << 10

	qemu = "qemu-system-x86_64"
)

// manifest tells the init what to do.
type manifest struct {
	Modules []string // names of files in /modules, in order
	Program string   // empty: a shell
	Args    []string
	Env     []string
}

// modules are loaded in the machine, with what they depend on.
var modules = []string{"nbd", "ublk_drv", "loop", "sch_netem", "btrfs", "xfs", "zram"}

// parameters are those of modules.
var parameters = map[string]string{
	"nbd": "nbds_max=4",
}

// Prepare sees to it that Run finds what it needs, downloading the kernel
// where it must.
func Prepare(ctx context.Context) error {
	for _, name := range []string{qemu, "busybox", "xz", "dpkg-deb", "apt-get"} {
		if lookTool(name) == "" {
			return missingTool(name)
		}
	}
	_, err := findKernel(ctx)
	return err
}

func missingTool(name string) error {
	return fmt.Errorf("the program %q is missing; run scripts/install-test-deps", name)
}

// Run boots the machine, runs the program, and returns its exit status.
func Run(ctx context.Context, c Config) (int, error) {
	k, err := findKernel(ctx)
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "memferry-vm")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // temporary files
	initrd := filepath.Join(dir, "initrd")
	if err := build(ctx, initrd, k, c); err != nil {
		return 0, err
	}
	return boot(ctx, dir, k.image, initrd, c)
}

// build makes the initramfs.
func build(ctx context.Context, to string, k *kernel, c Config) error {
	mods, err := k.load(ctx, modules...)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	for _, dir := range []string{"/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/mnt", "/var/tmp"} {
		a.dir(dir)
	}
	a.file("/init", self)
	a.data("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	a.data("/etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	a.data("/etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n"))
	a.symlink("/etc/mtab", "/proc/mounts")
	m := manifest{Args: c.Args, Env: c.Env}
	for _, mod := range mods {
		m.Modules = append(m.Modules, mod.name)
		a.data("/modules/"+mod.name, 0o644, mod.image)
	}
	if c.Program != "" {
		m.Program = "/test/" + filepath.Base(c.Program)
		a.file(m.Program, c.Program)
	}
	a.dir(guestDir)
	if testdata := filepath.Join(c.Dir, "testdata"); c.Dir != "" && isDir(testdata) {
		a.tree(guestDir+"/testdata", testdata)
	}
	if err := addTools(ctx, a); err != nil {
		return err
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	a.data(manifestFile, 0o644, text)
	if err := a.close(); err != nil {
		return err
	}
	return f.Close()
}

// guestDir is where the program runs in the machine. The host's directory would
// not do: it may lie below one on which the machine mounts something.
const guestDir = "/test/dir"

func isDir(name string) bool {
	st, err := os.Stat(name)
	return err == nil && st.IsDir()
}

// The machine's serial ports. The first has the kernel's messages, or the
// shell.
const (
	portConsole = "/dev/ttyS0"
	portOut     = "/dev/ttyS1" // what the program writes
	portResult  = "/dev/ttyS2" // its exit status, in decimal
)

// boot runs QEMU.
func boot(ctx context.Context, dir, image, initrd string, c Config) (int, error) {
	if c.Timeout <= 0 {
		c.Timeout = time.Hour
	}
	limit := c.Timeout + bootTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the machine did not end within %v", limit))
	defer cancel()
	console, result := filepath.Join(dir, "console"), filepath.Join(dir, "result")
	args := []string{
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", cpus, "-m", memory,
		"-display", "none", "-monitor", "none", "-no-reboot", "-nodefaults",
		"-kernel", image, "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1 oops=panic ",
	}
	// One serial port each: see the constants above.
	if c.Program == "" {
		args = append(args, "-serial", "mon:stdio", "-serial", "null")
	} else {
		args = append(args, "-serial", "file:"+console, "-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out")
	}
	args = append(args, "-serial", "file:"+result)
	cmd := exec.CommandContext(ctx, qemu, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return verdict(err, console, result)
}

// verdict is what the machine said its program came to.
func verdict(err error, console, result string) (int, error) {
	if err == nil {
		text, rerr := os.ReadFile(result)
		status, aerr := strconv.Atoi(strings.TrimSpace(string(text)))
		switch {
		case rerr != nil || aerr != nil:
			err = errors.New("the machine ended without telling a result")
		case status == initFailed:
			err = errors.New("the machine could not run the program")
		default:
			return status, nil
		}
	}
	return 0, fmt.Errorf("%w; its last messages:\n%s", err, tail(console))
}

// tail is the end of the kernel's messages.
func tail(name string) string {
	text, err := os.ReadFile(name)
	if err != nil {
		return "(none: " + err.Error() + ")"
	}
	if len(text) > maxLog {
		text = text[len(text)-maxLog:]
	}
	return string(text)
}
