package testenv

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// leakGrace is how long descriptors that are being closed in the background
// may take before they count as leaked.
const leakGrace = 3 * time.Second

// Main runs a package's tests and fails the run when they leave goroutines or
// open file descriptors behind. Use it as the whole of TestMain:
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
func Main(m *testing.M, options ...goleak.Option) {
	goleak.VerifyTestMain(&checked{m}, options...)
}

// checked adds the check of descriptors to a testing.M.
type checked struct{ m goleak.TestingM }

func (c *checked) Run() int {
	before, err := openFiles()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testenv: descriptors are not checked:", err)
		return c.m.Run()
	}
	code := c.m.Run()
	if code != 0 || fuzzing() {
		return code
	}
	if leaked := leakedFiles(before, leakGrace); len(leaked) > 0 {
		fmt.Fprintf(os.Stderr, "testenv: file descriptors left open by a successful test run:\n\t%s\n",
			strings.Join(leaked, "\n\t"))
		return 1
	}
	return code
}

// fuzzing tells whether this process is a fuzzing coordinator or worker, which
// keep pipes and files of their own.
func fuzzing() bool {
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != "" && f.Value.String() != "false" {
			return true
		}
	}
	return false
}

// openFiles maps this process's descriptors to what they refer to (proc(5),
// /proc/pid/fd), without those that the Go runtime keeps for itself.
func openFiles() (map[string]string, error) {
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := make(map[string]string, len(entries))
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // the descriptor of the directory itself, closed since
		}
		if !runtimeFile(target) {
			files[e.Name()] = target
		}
	}
	return files, nil
}

// runtimeFile tells whether a descriptor may be the runtime's: its poller is
// made with the first pollable file, hence possibly during the tests.
func runtimeFile(target string) bool {
	return target == "anon_inode:[eventpoll]" || target == "anon_inode:[eventfd]" ||
		strings.HasPrefix(target, "/sys/fs/cgroup/")
}

// leakedFiles describes the descriptors that were not there before, once they
// had time to go.
func leakedFiles(before map[string]string, grace time.Duration) []string {
	end := time.Now().Add(grace)
	for {
		now, err := openFiles()
		if err != nil {
			return nil
		}
		maps.DeleteFunc(now, func(fd, target string) bool { return before[fd] == target })
		if len(now) == 0 {
			return nil
		}
		if time.Now().After(end) {
			var out []string
			for _, fd := range slices.Sorted(maps.Keys(now)) {
				out = append(out, fd+" -> "+now[fd])
			}
			return out
		}
		time.Sleep(10 * time.Millisecond)
	}
}
