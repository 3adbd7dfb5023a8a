package uffd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// plainEnv makes the test binary a program whose main doesn't call Helper, and
// names what it opens.
const plainEnv = "MEMFERRY_TEST_UFFD_PLAIN"

func plain(url string) {
	m, err := OpenURL(context.Background(), url, Options{})
	if err == nil {
		fmt.Printf("%s\n", m.Bytes()[:5])
		err = m.Close()
	}
	fmt.Println(err)
	os.Exit(0)
}

func runPlain(t *testing.T, path string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), plainEnv+"=file:"+sourceFile(t, []byte("hello, memory")), "PATH="+path)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// TestNoHelper: a program without a helper is served by the memferry command,
// and told what to do where there is none.
func TestNoHelper(t *testing.T) {
	closed(t, helped(t, "file:"+sourceFile(t, make([]byte, 100)), Options{})) // skips where there is none
	out := runPlain(t, t.TempDir())
	if n := strings.Count(out, "\n"); n != 1 || !strings.Contains(out, "call uffd.Helper first thing in main, or install the memferry command in PATH") {
		t.Errorf("without a command: %q", out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.Symlink(self, filepath.Join(bin, "memferry")); err != nil {
		t.Fatal(err)
	}
	if out := runPlain(t, bin); out != "hello\n<nil>\n" {
		t.Errorf("with a command: %q", out)
	}
	for name, script := range map[string]string{
		"that is another program": "#!/bin/sh\nexit 2\n",
		"of another version":      "#!/bin/sh\nexec env " + otherEnv + "=1 " + self + " " + HelperCommand + "\n",
	} {
		bin := t.TempDir()
		if err := os.WriteFile(filepath.Join(bin, "memferry"), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		out := runPlain(t, bin+":"+os.Getenv("PATH"))
		if !strings.Contains(out, "helper") || !strings.Contains(out, "memferry") || strings.Contains(out, "hello") {
			t.Errorf("a command %s: %q", name, out)
		}
	}
}

// otherEnv makes the test binary a helper of another version.
const otherEnv = "MEMFERRY_TEST_UFFD_OTHER"

func other() {
	c, err := newConn(os.NewFile(3, "owner"))
	if err == nil {
		_, err = c.receive(new(message))
	}
	if err == nil {
		err = c.send(&message{Protocol: protocol + 1})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(0)
}

// TestHelperSignals: a helper outlives the signals that end a service, so that
// its owner can still hand over what it has.
func TestHelperSignals(t *testing.T) {
	path := sourceFile(t, make([]byte, 1<<20))
	m := helped(t, "file:"+path, Options{})
	defer closed(t, m)
	tracked(t, m)
	r, ok := m.engine.(*remote)
	if !ok {
		t.Fatalf("engine is %T", m.engine)
	}
	m.Bytes()[5000] = 42
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if err := r.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || got[5000] != 42 {
		t.Errorf("the source did not get the byte (%v)", err)
	}
}

// TestProtocol: an owner of another version is not served.
func TestProtocol(t *testing.T) {
	ours, theirs, err := socketpair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.close()
	done := make(chan error, 1)
	go func() {
		defer theirs.Close()
		done <- help(int(dup(t, theirs)), func(context.Context, string) (memferry.Backend, error) {
			return nil, errors.New("opened")
		})
	}()
	if err := ours.send(&message{Protocol: protocol + 1, URL: "file:x"}); err != nil {
		t.Fatal(err)
	}
	var m message
	if _, err := ours.receive(&m); err != nil || m.Protocol != protocol || m.Error != nil {
		t.Errorf("answer %+v, %v", m, err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-testenv.Deadline(t, hang).Done():
		t.Fatal("the helper goes on")
	}
	if err := errProtocol(7); !errors.Is(err, memferry.ErrNotSupported) {
		t.Error(err)
	}
}

func dup(t *testing.T, f *os.File) uintptr {
	t.Helper()
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return uintptr(fd)
}
