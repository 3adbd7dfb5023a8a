package examples

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// build makes one of the programs.
func build(t *testing.T, name string) string {
	t.Helper()
	testenv.Kernel(t, "userfaultfd")
	program := filepath.Join(t.TempDir(), name)
	if out, err := exec.Command("go", "build", "-o", program, "./"+name).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// says runs a program and returns what it prints.
func says(t *testing.T, program string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(testenv.Deadline(t, time.Minute), program, args...).CombinedOutput()
	return string(out), err
}

func TestPattern(t *testing.T) {
	out, err := says(t, build(t, "pattern"))
	want := "3 squared is 9\n1000000 squared is 1000000000000\n137438953471 squared is "
	if err != nil || !strings.HasPrefix(out, want) {
		t.Fatalf("%v\n%s", err, out)
	}
	// The last page may be counted a moment after it is there.
	end := regexp.MustCompile(` is 18446743798831644673\n(8192|12288) bytes of 1099511627776 were computed\n$`)
	if !end.MatchString(out) {
		t.Errorf("said\n%s", out)
	}
}

func TestFile(t *testing.T) {
	program := build(t, "file")
	path := filepath.Join(t.TempDir(), "text")
	text := strings.Repeat("a line\n", 100_000)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{path}, {"-mark", "MARK", path}} {
		if out, err := says(t, program, args...); err != nil || out != "100000 lines\n" {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "MARKne\n"+text[7:] {
		t.Errorf("the file begins with %q, %v", got[:min(len(got), 20)], err)
	}
	if out, err := says(t, program, path+".not"); err == nil {
		t.Errorf("a file that is not there: %s", out)
	}
}

// TestObject: what lies early is found before all of it is fetched; an object
// that is replaced meanwhile is an error, not a mixture.
func TestObject(t *testing.T) {
	program := build(t, "object")
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	copy(content[5<<20:], "needle")
	var tag atomic.Pointer[string]
	var changing atomic.Bool
	one, two := `"one"`, `"two"`
	tag.Store(&one)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", *tag.Load())
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
		if changing.Load() && r.Method == http.MethodHead {
			tag.Store(&two)
		}
	}))
	defer server.Close()
	if out, err := says(t, program, server.URL, "needle"); err != nil || out != fmt.Sprintf("found at %d\n", 5<<20) {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := says(t, program, server.URL, "hay"); err == nil || !strings.Contains(out, "not found") {
		t.Errorf("%v\n%s", err, out)
	}
	changing.Store(true)
	out, err := says(t, program, server.URL, "needle")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || strings.Contains(out, "found at") {
		t.Errorf("an object that changes: %v\n%s", err, out)
	}
	if out, err := says(t, program, server.URL+"\x7f", "x"); err == nil {
		t.Errorf("a bad URL: %s", out)
	}
}
