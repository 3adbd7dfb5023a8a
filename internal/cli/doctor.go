package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/internal/sys/uffd"
)

// finding is what doctor says about one feature.
type finding struct {
	Feature string `json:"feature"`
	OK      bool   `json:"ok"`
	Needed  bool   `json:"needed"` // by the commands that exist today
	Detail  string `json:"detail"`
	Remedy  string `json:"remedy,omitempty"`
}

const doctorLong = `Report what this machine can do for memferry, and how to enable what is missing.

Features marked "needed" are those that mount relies on; the exit status is 1
where one of them is missing. The others make it faster or serve frontends of
other kinds. Nothing on the machine is changed.`

func (a *app) doctorCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this machine can do",
		Long:  doctorLong,
		Example: `  memferry doctor
  memferry doctor --json | jq '.[] | select(.ok | not)'`,
		Args: positional(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			found := examine()
			if err := a.printFindings(found, asJSON); err != nil {
				return err
			}
			for _, f := range found {
				if f.Needed && !f.OK {
					return withRemedy(fmt.Errorf("doctor: %s: %s", f.Feature, f.Detail), "%s", f.Remedy)
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) printFindings(found []finding, asJSON bool) error {
	if asJSON {
		return writeJSON(a.env.Stdout, found)
	}
	rows := [][]string{{"FEATURE", "STATE", "DETAIL"}}
	for _, f := range found {
		state := "yes"
		if !f.OK {
			state = "no"
			if f.Needed {
				state = "NO (needed)"
			}
		}
		detail := f.Detail
		if f.Remedy != "" && !f.OK {
			detail += "; " + f.Remedy
		}
		rows = append(rows, []string{f.Feature, state, detail})
	}
	return table(a.env.Stdout, rows)
}

func examine() []finding {
	return []finding{
		checkKernel(), checkFUSE(), checkFusermount(), checkPassthrough(),
		checkUserfaultfd(), checkPoison(), checkTracking(), checkNBD(), checkUblk(), checkUserNS(),
		checkFiles(), checkLocked(), checkRuntimeDir(),
	}
}

// kernelRelease returns major, minor and the full text of uname(2)'s release.
func kernelRelease() (major, minor int, text string) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return 0, 0, "unknown"
	}
	text = unix.ByteSliceToString(u.Release[:])
	// A vendor's suffix does not matter here.
	_, _ = fmt.Sscanf(text, "%d.%d", &major, &minor)
	return major, minor, text
}

func checkKernel() finding {
	major, minor, text := kernelRelease()
	f := finding{Feature: "kernel", OK: true, Needed: true, Detail: fmt.Sprintf("Linux %s, %d CPUs", text, runtime.NumCPU())}
	if major < 5 || major == 5 && minor < 10 {
		f.OK = false
		f.Remedy = "memferry is made for Linux 5.10 or newer"
	}
	return f
}

func checkFUSE() finding {
	f := finding{Feature: "fuse", Needed: true}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		unix.Close(fd)
		f.OK = true
		f.Detail = "/dev/fuse can be opened"
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		f.Detail = "no /dev/fuse"
		f.Remedy = "load it with `modprobe fuse`; in a container, pass --device /dev/fuse"
	case errors.Is(err, fs.ErrPermission):
		f.Detail = "/dev/fuse: permission denied"
		f.Remedy = "`chmod 666 /dev/fuse` as root, as udev does by default; in a container, pass --device /dev/fuse"
	default:
		f.Detail = "/dev/fuse: " + err.Error()
	}
	return f
}

func checkFusermount() finding {
	f := finding{Feature: "fusermount3", Needed: os.Geteuid() != 0}
	path, err := exec.LookPath("fusermount3")
	if err != nil {
		f.Detail = "not found; only root can mount"
		f.Remedy = "install the package fuse3"
		return f
	}
	f.Detail = path
	info, err := os.Stat(path)
	if err == nil && info.Mode()&fs.ModeSetuid == 0 && os.Geteuid() != 0 {
		f.Detail += " is not set-user-ID"
		f.Remedy = "`chmod u+s " + path + "` as root"
		return f
	}
	f.OK = true
	return f
}

func checkPassthrough() finding {
	// CONFIG_FUSE_PASSTHROUGH came with 6.9; opening a backing file takes
	// CAP_SYS_ADMIN (fs/fuse/backing.c).
	f := finding{Feature: "fuse passthrough"}
	major, minor, _ := kernelRelease()
	switch config := kernelConfig("CONFIG_FUSE_PASSTHROUGH"); {
	case major < 6 || major == 6 && minor < 9:
		f.Detail = "needs Linux 6.9"
		f.Remedy = "local data is served by memferry instead, somewhat slower"
	case config == "n":
		f.Detail = "the kernel is built without CONFIG_FUSE_PASSTHROUGH"
		f.Remedy = "local data is served by memferry instead, somewhat slower"
	case !hasCapability(unix.CAP_SYS_ADMIN):
		f.Detail = "the kernel reserves it for CAP_SYS_ADMIN"
		f.Remedy = "mount as root where it matters"
	default:
		f.OK = true
		f.Detail = "available"
	}
	return f
}

func checkUserfaultfd() finding {
	f := finding{Feature: "userfaultfd"}
	// userfaultfd(2): since 5.11 UFFD_USER_MODE_ONLY needs no privilege.
	const userModeOnly = 1
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno == 0 {
		unix.Close(int(fd))
		f.OK, f.Detail = true, "faults of user and kernel mode"
		return f
	}
	if dev, err := unix.Open("/dev/userfaultfd", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		unix.Close(dev)
		f.OK, f.Detail = true, "through /dev/userfaultfd"
		return f
	}
	fd, _, errno = unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|userModeOnly, 0, 0)
	switch errno {
	case 0:
		unix.Close(int(fd))
		f.Detail = "faults of user mode only: system calls on absent memory fail"
		f.Remedy = "`sysctl vm.unprivileged_userfaultfd=1`, or give access to /dev/userfaultfd"
	case unix.ENOSYS:
		f.Detail = "the kernel is built without CONFIG_USERFAULTFD"
	default:
		f.Detail = errno.Error()
		f.Remedy = "allow the system call in the container's seccomp profile"
	}
	return f
}

// checkPoison and checkTracking are about memory (frontend/uffd).
func checkPoison() finding {
	return checkMemory("userfaultfd poison", uffd.Have(uffd.FeaturePoison),
		"memory whose source is gone fails", "memory whose source is gone waits for it")
}

func checkTracking() finding {
	err := uffd.Have(uffd.FeatureWPAsync | uffd.FeatureWPShmem)
	if err == nil {
		err = uffd.HaveScan()
	}
	return checkMemory("userfaultfd write tracking", err, "writes to memory are found without stopping the writer",
		"memory can't be written to")
}

func checkMemory(feature string, err error, with, without string) finding {
	if err != nil {
		return finding{Feature: feature, Detail: err.Error(), Remedy: without + " until then"}
	}
	return finding{Feature: feature, OK: true, Detail: with}
}

func checkNBD() finding {
	f := finding{Feature: "nbd block device"}
	if n, _ := filepath.Glob("/dev/nbd*"); len(n) > 0 {
		f.OK, f.Detail = true, fmt.Sprintf("%d devices", len(n))
		return f
	}
	f.Detail = "no /dev/nbd*"
	f.Remedy = moduleRemedy("nbd")
	return f
}

func checkUblk() finding {
	f := finding{Feature: "ublk block device"}
	_, err := os.Stat("/dev/ublk-control")
	if err == nil {
		f.OK, f.Detail = true, "/dev/ublk-control"
		return f
	}
	f.Detail = "no /dev/ublk-control (Linux 6.0 has it)"
	f.Remedy = moduleRemedy("ublk_drv")
	return f
}

// moduleRemedy tells how to get a kernel module, where that is possible.
func moduleRemedy(name string) string {
	_, _, release := kernelRelease()
	if _, err := os.Stat(filepath.Join("/lib/modules", release)); err != nil {
		return "this kernel has no loadable modules here; use one that is built with " + name
	}
	return "`modprobe " + name + "` as root"
}

func checkUserNS() finding {
	f := finding{Feature: "user namespaces"}
	limit := readTrim("/proc/sys/user/max_user_namespaces")
	switch {
	case limit == "":
		f.Detail = "the kernel is built without CONFIG_USER_NS"
	case limit == "0":
		f.Detail = "max_user_namespaces is 0"
		f.Remedy = "`sysctl user.max_user_namespaces=10000`"
	case readTrim("/proc/sys/kernel/unprivileged_userns_clone") == "0":
		f.Detail = "reserved for root"
		f.Remedy = "`sysctl kernel.unprivileged_userns_clone=1`"
	case readTrim("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1" && os.Geteuid() != 0:
		f.Detail = "restricted by AppArmor"
		f.Remedy = "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
	default:
		f.OK, f.Detail = true, "up to "+limit
	}
	return f
}

// wantFiles is enough descriptors for a server with a thousand connections.
const wantFiles = 4096

func checkFiles() finding {
	f := finding{Feature: "open files"}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		f.Detail = err.Error()
		return f
	}
	f.OK = l.Max >= wantFiles
	f.Detail = fmt.Sprintf("limit %s, at most %s", limitText(l.Cur), limitText(l.Max))
	f.Remedy = fmt.Sprintf("`ulimit -Hn %d`, or LimitNOFILE= in the service, for servers with many clients", wantFiles)
	return f
}

func checkLocked() finding {
	f := finding{Feature: "locked memory"}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		f.Detail = err.Error()
		return f
	}
	const want = 8 << 20
	f.OK = l.Max >= want
	f.Detail = "limit " + limitBytes(l.Cur) + ", at most " + limitBytes(l.Max)
	f.Remedy = "raise it with `ulimit -Hl`, or LimitMEMLOCK= in the service, for registered buffers"
	return f
}

func checkRuntimeDir() finding {
	f := finding{Feature: "runtime directory"}
	var candidates []string
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		candidates = append(candidates, d)
	}
	if os.Geteuid() == 0 {
		candidates = append(candidates, "/run")
	}
	for _, d := range append(candidates, "/tmp") {
		if unix.Access(d, unix.W_OK|unix.X_OK) == nil {
			f.OK, f.Detail = true, "control sockets go below "+d
			return f
		}
	}
	f.Detail = "none can be written to"
	f.Remedy = "set XDG_RUNTIME_DIR to a directory of your own"
	return f
}

func limitText(n uint64) string {
	if n == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return strconv.FormatUint(n, 10)
}

func limitBytes(n uint64) string {
	if n >= 1<<62 {
		return "unlimited"
	}
	return size.Format(int64(n))
}

func readTrim(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// hasCapability reports whether capability c is effective in this process.
func hasCapability(c uint) bool {
	for _, l := range strings.Split(readTrim("/proc/self/status"), "\n") {
		if hex, ok := strings.CutPrefix(l, "CapEff:"); ok {
			mask, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && mask>>c&1 == 1
		}
	}
	return false
}
