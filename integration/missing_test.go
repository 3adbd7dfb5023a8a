package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memferry/memferry/internal/testenv"
)

// TestMissingFUSE mounts on machines without what mounting takes, each made in
// a mount namespace of its own. The refusal is one line, with the remedy, and
// leaves nothing behind.
func TestMissingFUSE(t *testing.T) {
	testenv.Root(t)
	need(t, "unshare", "setpriv")
	const (
		bare   = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3"
		nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups"
	)
	// Names that exec.LookPath would find; a file that can't be executed hides
	// what is below it.
	hide := `for f in /bin/fusermount3 /bin/fusermount /usr/bin/fusermount3 /usr/bin/fusermount; do
		if [ -e $f ]; then mount --bind /proc/version $f; fi; done`
	for name, c := range map[string]struct {
		machine string // makes it, as root
		as      string // a prefix of the command
		says    []string
	}{
		"no device":           {bare, "", []string{"/dev/fuse", "modprobe fuse", "--device"}},
		"no device, no root":  {bare, nobody, []string{"/dev/fuse", "modprobe fuse", "--device"}},
		"no driver":           {bare + " && mknod -m 666 /dev/fuse c 10 254", "", []string{"/dev/fuse", "modprobe fuse"}},
		"no helper, no root":  {hide, nobody, []string{"fusermount3", "package fuse3", "run as root"}},
		"no helper, no right": {hide, "setpriv --bounding-set -sys_admin --inh-caps -sys_admin", []string{"fusermount3", "package fuse3"}},
	} {
		t.Run(name, func(t *testing.T) {
			program, dir := forAnyone(t)
			at, cache := filepath.Join(dir, "at"), filepath.Join(dir, "cache")
			script := c.machine + ` && exec ` + c.as + ` "$@"`
			refusedBy(t, "unshare", 1, append(c.says, at), "-m", "sh", "-c", script, "sh",
				"env", "XDG_RUNTIME_DIR="+dir, program, "mount", "--cache", cache, "mem:?size=1M", at)
			entries, err := os.ReadDir(dir)
			if err != nil || len(entries) != 0 {
				t.Errorf("left behind: %v, %v", entries, err)
			}
			if isFUSE(at) {
				t.Errorf("%s is mounted", at)
			}
		})
	}
}

// forAnyone returns a copy of the command and an empty directory that any user
// may use.
func forAnyone(t *testing.T) (program, dir string) {
	t.Helper()
	root, err := os.MkdirTemp("", "mfany")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	program, dir = filepath.Join(root, "memferry"), filepath.Join(root, "dir")
	copyFile(t, memferry, program)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{root: 0o755, program: 0o755, dir: 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	return program, dir
}

// refusedBy is refused for memferry started by another program.
func refusedBy(t *testing.T, program string, status int, names []string, args ...string) {
	t.Helper()
	out, err := try(t, program, args...)
	out = strings.TrimSpace(out)
	if exitCode(err) != status || strings.Count(out, "\n") > 0 || !strings.HasPrefix(out, "memferry: ") {
		t.Errorf("exit status %d, want %d and one line of memferry's:\n%s", exitCode(err), status, out)
	}
	for _, n := range names {
		if !strings.Contains(out, n) {
			t.Errorf("it does not say %q:\n%s", n, out)
		}
	}
	if strings.Contains(out, "check the name") || strings.Count(out, "; ") != 1 {
		t.Errorf("want one remedy, of the error's own:\n%s", out)
	}
	t.Log(out)
}
