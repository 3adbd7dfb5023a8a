package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/memferry/memferry/internal/testenv"
)

// memferry is the path of the command under test.
var memferry string

// hang is how long anything here may take before it counts as hung. It times
// nothing: what is merely slow passes.
const hang = 4 * time.Minute

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "mfbin")
	if err == nil {
		memferry, err = build(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		os.Exit(1)
	}
	testenv.Main(m, goleak.Cleanup(func(code int) {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, "integration:", err)
		}
		os.Exit(code)
	}))
}

// build compiles the command once per test run.
func build(dir string) (string, error) {
	path := filepath.Join(dir, "memferry")
	cmd := exec.Command("go", "build", "-o", path, "../cmd/memferry")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the command: %w\n%s", err, out)
	}
	return path, nil
}
