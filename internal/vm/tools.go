package vm

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// tools are the programs that tests in the machine call; scripts/install-test-deps
// installs them. One that the host lacks is left out: the test that wants it
// says so.
var tools = []string{
	"fio", "nbd-client", "nbdkit", "nbdcopy", "nbdinfo", "sqlite3",
	"mke2fs", "mkfs.ext4", "e2fsck", "fsck.ext4", "debugfs", "tune2fs",
	"mkfs.btrfs", "btrfs", "mkfs.xfs", "xfs_repair",
	"mkswap", "swapon", "swapoff", "blkdiscard", "blockdev", "losetup", "mount", "umount", "dd", "cmp", "sha256sum",
}

// data are files that those programs read.
var data = []string{"/etc/mke2fs.conf"}

// searchPath is where programs lie, on the host and in the machine.
const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// addTools copies the tools and busybox, which stands in for all else.
func addTools(ctx context.Context, a *archive) error {
	loaded := map[string]bool{}
	for _, name := range tools {
		host := lookTool(name)
		if host == "" {
			continue
		}
		if err := addProgram(ctx, a, filepath.Join("/usr/bin", name), host, loaded); err != nil {
			return err
		}
	}
	for _, f := range data {
		if _, err := os.Stat(f); err == nil {
			a.file(f, f)
		}
	}
	addNbdkit(ctx, a, loaded)
	return addBusybox(ctx, a)
}

func lookTool(name string) string {
	for _, dir := range filepath.SplitList(searchPath) {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p
		}
	}
	return ""
}

// addProgram copies a program and the libraries that ldd(1) tells of.
func addProgram(ctx context.Context, a *archive, name, host string, loaded map[string]bool) error {
	a.file(name, host)
	out, err := output(ctx, "", "ldd", host)
	if err != nil {
		return nil // statically linked, or a script
	}
	for _, l := range strings.Split(out, "\n") {
		// "libc.so.6 => /lib/x/libc.so.6 (0x7f)", or the loader, without "=>".
		_, lib, ok := strings.Cut(l, "=> ")
		if !ok {
			lib = l
		}
		lib, _, _ = strings.Cut(strings.TrimSpace(lib), " ")
		if !filepath.IsAbs(lib) || loaded[lib] {
			continue
		}
		loaded[lib] = true
		a.file(lib, lib)
	}
	return a.err
}

// nbdkitPlugins are those that tests use.
var nbdkitPlugins = []string{"memory", "file", "null"}

// addNbdkit copies the plugins of nbdkit, which it opens at run time.
func addNbdkit(ctx context.Context, a *archive, loaded map[string]bool) {
	for _, p := range nbdkitPlugins {
		found, _ := filepath.Glob("/usr/lib/*/nbdkit/plugins/nbdkit-" + p + "-plugin.so")
		for _, f := range found {
			a.fail(addProgram(ctx, a, f, f, loaded))
		}
	}
}

func addBusybox(ctx context.Context, a *archive) error {
	host := lookTool("busybox")
	if host == "" {
		return missingTool("busybox")
	}
	applets, err := output(ctx, "", host, "--list")
	if err != nil {
		return err
	}
	a.file("/bin/busybox", host)
	for _, name := range strings.Fields(applets) {
		if !a.has(filepath.Join("/usr/bin", name)) {
			a.symlink(filepath.Join("/bin", name), "busybox")
		}
	}
	return a.err
}
