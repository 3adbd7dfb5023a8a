package vm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// TestDrivers runs in the machine, and tells that it is what it is for.
func TestDrivers(t *testing.T) {
	testenv.NBD(t)
	testenv.Ublk(t)
	for _, dev := range []string{"/dev/nbd0", "/dev/loop-control"} {
		if _, err := os.Stat(dev); err != nil {
			t.Error(err)
		}
	}
}

// TestPrograms runs those that were copied with their libraries.
func TestPrograms(t *testing.T) {
	if os.Getenv(testenv.EnvVM) != "1" {
		t.Skip("needs the virtual machine: `make test-vm` runs it there")
	}
	for _, args := range [][]string{
		{"fio", "--version"},
		{"mkfs.ext4", "-V"},
		{"fsck.ext4", "-V"},
		{"mkfs.xfs", "-V"},
		{"mkfs.btrfs", "--version"},
		{"mkswap", "--version"},
		{"blkdiscard", "--version"},
		{"nbdkit", "memory", "--version"},
		{"sh", "-c", "true"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestArchive has a cpio that somebody else wrote unpack an archive.
func TestArchive(t *testing.T) {
	busybox := testenv.Program(t, "busybox")
	dir := t.TempDir()
	host := filepath.Join(dir, "host")
	if err := os.MkdirAll(filepath.Join(host, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	long := bytes.Repeat([]byte("memferry\n"), 12345)
	if err := os.WriteFile(filepath.Join(host, "sub", "long"), long, 0o755); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	a := newArchive(&b)
	for i := range 5 { // every length modulo 4, of names and of data
		name := "/d/" + strings.Repeat("n", i+1)
		a.data(name, 0o640, []byte(strings.Repeat("x", i)))
	}
	a.data("/d/n", 0o600, []byte("the second of one name does not count"))
	a.symlink("/d/link", "n")
	a.tree("/copy", host)
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(busybox, "cpio", "-id")
	cmd.Dir, cmd.Stdin = out, &b
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, said)
	}
	for i := range 5 {
		name := filepath.Join(out, "d", strings.Repeat("n", i+1))
		if got, err := os.ReadFile(name); err != nil || string(got) != strings.Repeat("x", i) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if target, err := os.Readlink(filepath.Join(out, "d", "link")); err != nil || target != "n" {
		t.Errorf("link to %q, %v", target, err)
	}
	got, err := os.ReadFile(filepath.Join(out, "copy", "sub", "long"))
	if err != nil || !bytes.Equal(got, long) {
		t.Errorf("the copied file has %d bytes, %v", len(got), err)
	}
	st, err := os.Stat(filepath.Join(out, "copy", "sub", "long"))
	if err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("its mode is %v, %v", st.Mode(), err)
	}
}

func TestArchiveOfWhatIsNotThere(t *testing.T) {
	a := newArchive(&bytes.Buffer{})
	a.file("/x", filepath.Join(t.TempDir(), "missing"))
	a.data("/y", 0o644, nil)
	if err := a.close(); !os.IsNotExist(unwrap(err)) {
		t.Errorf("close: %v", err)
	}
}

func unwrap(err error) error {
	if u, ok := err.(interface{ Unwrap() error }); ok { //nolint:errorlint // one step is meant
		return u.Unwrap()
	}
	return err
}

func TestVerdict(t *testing.T) {
	dir := t.TempDir()
	console, result := filepath.Join(dir, "console"), filepath.Join(dir, "result")
	if _, err := verdict(nil, console, result); err == nil {
		t.Error("a machine without a result passed")
	}
	if err := os.WriteFile(console, []byte("Kernel panic"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(result, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := verdict(nil, console, result); err == nil || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("a machine that panicked: %v", err)
	}
	if err := os.WriteFile(result, []byte("3\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if status, err := verdict(nil, console, result); status != 3 || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
}
