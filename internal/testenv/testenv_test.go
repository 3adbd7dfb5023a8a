package testenv

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

// recorder is a testing.TB that ends its goroutine as the real one does, and
// keeps what it said.
type recorder struct {
	testing.TB
	skipped, failed string
}

func (r *recorder) Helper()             {}
func (r *recorder) Logf(string, ...any) {}
func (r *recorder) Skip(a ...any)       { r.skipped = fmt.Sprint(a...); runtime.Goexit() }
func (r *recorder) Skipf(f string, a ...any) {
	r.skipped = fmt.Sprintf(f, a...)
	runtime.Goexit()
}

func (r *recorder) Fatalf(f string, a ...any) {
	r.failed = fmt.Sprintf(f, a...)
	runtime.Goexit()
}

func record(f func(testing.TB)) *recorder {
	r := &recorder{}
	done := make(chan struct{})
	go func() { defer close(done); f(r) }()
	<-done
	return r
}

func TestMissingProgram(t *testing.T) {
	need := func(t testing.TB) { Program(t, "no-such-program") }

	t.Setenv(EnvCI, "")
	r := record(need)
	if !strings.Contains(r.skipped, "no-such-program") || !strings.Contains(r.skipped, installer) || r.failed != "" {
		t.Errorf("skipped with %q, failed with %q; want a skip that names program and remedy", r.skipped, r.failed)
	}

	t.Setenv(EnvCI, "1")
	r = record(need)
	if r.skipped != "" || !strings.Contains(r.failed, "no-such-program") {
		t.Errorf("skipped with %q, failed with %q; want a failure in CI", r.skipped, r.failed)
	}
}

func TestMissingKernelFeatureSkipsInCI(t *testing.T) {
	t.Setenv(EnvCI, "1")
	r := record(func(t testing.TB) { Module(t, "no-such-module") })
	if !strings.Contains(r.skipped, "no-such-module") || r.failed != "" {
		t.Errorf("skipped with %q, failed with %q; want a skip", r.skipped, r.failed)
	}
	if probeRelease(99, 0) == nil || probeRelease(2, 6) != nil {
		t.Error("kernel versions are not compared")
	}
	r = record(func(t testing.TB) { Kernel(t, "no-such-feature") })
	if r.failed == "" {
		t.Error("an unknown feature did not fail")
	}
	for name := range probes {
		record(func(t testing.TB) { Kernel(t, name) })
	}
}

func TestSeed(t *testing.T) {
	t.Setenv(EnvSeed, "-42")
	if got := Seed(t); got != -42 {
		t.Errorf("seed %d, want the environment's -42", got)
	}
	t.Setenv(EnvSeed, "x")
	if r := record(func(t testing.TB) { Seed(t) }); r.failed == "" {
		t.Error("a bad seed was accepted")
	}
}

func TestTempSocket(t *testing.T) {
	t.Setenv("TMPDIR", "/"+strings.Repeat("long/", 40))
	path := TempSocket(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestDeadlineEndsBeforeTheBinary(t *testing.T) {
	end, ok := Deadline(t, 1000*time.Hour).Deadline()
	if !ok {
		t.Fatal("no deadline")
	}
	if limit, ok := t.Deadline(); ok && !end.Before(limit) {
		t.Errorf("ends at %v, after the test binary at %v", end, limit)
	}
}

func TestLeakedFileIsFound(t *testing.T) {
	before, err := openFiles()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if leaked := leakedFiles(before, 0); len(leaked) != 1 || !strings.HasSuffix(leaked[0], os.Args[0]) {
		t.Errorf("found %q, want the one open file %s", leaked, os.Args[0])
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if leaked := leakedFiles(before, 0); leaked != nil {
		t.Errorf("found %q after the close", leaked)
	}
}
