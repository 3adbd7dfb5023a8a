package cli

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/memferry/memferry/internal/testenv"
)

// TestMain makes the test binary be memferry where it is called so.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "memferry" {
		os.Exit(Main(OSEnv()))
	}
	testenv.Main(m)
}

// patience only catches hangs.
const patience = 30 * time.Second

// TestScripts runs testdata/*.txtar. Beyond the usual commands of testscript
// there are
//
//	until COMMAND…      run COMMAND until it succeeds
//	random FILE BYTES   make a file of noise, the same each time
//	tmpfs DIR BYTES     mount a small file system, for the test's time (root)
//
// and the conditions [fuse] and [root].
func TestScripts(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.Symlink(self, filepath.Join(bin, "memferry")); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			// The socket's path is short, whatever the name of the test.
			runtime, err := os.MkdirTemp("", "mf")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(runtime) })
			e.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
			e.Setenv("XDG_RUNTIME_DIR", runtime)
			e.Setenv("SOCK", filepath.Join(runtime, "nbd.sock"))
			return nil
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "fuse":
				f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
				if err != nil {
					return false, nil
				}
				return true, f.Close()
			case "root":
				return os.Geteuid() == 0, nil
			}
			return false, errors.New("unknown condition " + cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"until": until, "random": random, "tmpfs": tmpfs,
		},
	})
}

func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: until COMMAND…")
	}
	deadline := time.Now().Add(patience)
	for {
		err := ts.Exec(args[0], args[1:]...)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("until %s: still failing after %v: %v", strings.Join(args, " "), patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func random(ts *testscript.TestScript, neg bool, args []string) {
	var n rateValue
	if neg || len(args) != 2 || n.Set(args[1]) != nil {
		ts.Fatalf("usage: random FILE BYTES")
	}
	data := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range data { // xorshift64
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		data[i] = byte(x)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), data, 0o600))
}

func tmpfs(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: tmpfs DIR BYTES")
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+args[1], "tmpfs", dir).CombinedOutput(); err != nil {
		ts.Fatalf("mount: %v: %s", err, out)
	}
	ts.Defer(func() { _ = exec.Command("umount", "-l", dir).Run() })
}
