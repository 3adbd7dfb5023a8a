package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// fake is a mount that counts.
type fake struct {
	Path    string
	unmount func(context.Context) error
	done    func()
}

func (f *fake) Status() any { return f }

func (f *fake) MarshalJSON() ([]byte, error) { return json.Marshal(map[string]string{"path": f.Path}) }

func (f *fake) Sync(context.Context) (any, error) { return map[string]int{"pushed": 5}, nil }

func (f *fake) Unmount(ctx context.Context) (any, error) {
	if f.done != nil {
		f.done()
	}
	if f.unmount == nil {
		return map[string]int{"pushed": 7}, nil
	}
	return nil, f.unmount(ctx)
}

// dirs is one runtime directory with a short path, not there yet.
func dirs(t *testing.T) []string {
	t.Helper()
	return []string{filepath.Join(filepath.Dir(testenv.TempSocket(t)), "memferry")}
}

func start(t *testing.T, dirs []string, path string, m Mount) *Server {
	t.Helper()
	s, err := Listen(dirs, path, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

func TestRoundTrip(t *testing.T) {
	d := dirs(t)
	m := &fake{Path: "/mnt/a"}
	s := start(t, d, "/mnt/a", m)
	c, err := Find(d, "/mnt/a")
	if err != nil {
		t.Fatal(err)
	}
	var st struct{ Path string }
	if err := c.Status(t.Context(), &st); err != nil || st.Path != "/mnt/a" {
		t.Errorf("Status: %+v, %v", st, err)
	}
	var sum struct{ Pushed int }
	if err := c.Sync(t.Context(), &sum); err != nil || sum.Pushed != 5 {
		t.Errorf("Sync: %+v, %v", sum, err)
	}
	info, err := os.Stat(filepath.Dir(s.Path()))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory %v, %v", info.Mode(), err)
	}
	m.done = func() { go s.Close(context.Background()) } // what a mount does next
	if err := c.Unmount(t.Context(), &sum); err != nil || sum.Pushed != 7 {
		t.Errorf("Unmount: %+v, %v", sum, err)
	}
	if _, err := os.Lstat(s.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if _, err := Find(d, "/mnt/a"); !errors.Is(err, ErrNotMounted) {
		t.Errorf("Find after Close: %v", err)
	}
}

func TestErrorsArrive(t *testing.T) {
	d := dirs(t)
	start(t, d, "/mnt/a", &fake{unmount: func(context.Context) error {
		return fmt.Errorf("the file is open: %w", memferry.ErrInUse)
	}})
	c, err := Find(d, "/mnt/a")
	if err != nil {
		t.Fatal(err)
	}
	var v any
	err = c.Unmount(t.Context(), &v)
	if !errors.Is(err, memferry.ErrInUse) || err.Error() != "the file is open: in use" {
		t.Errorf("Unmount: %v", err)
	}
}

func TestClientLeaves(t *testing.T) {
	d := dirs(t)
	entered, left := make(chan struct{}), make(chan struct{})
	start(t, d, "/mnt/a", &fake{unmount: func(ctx context.Context) error {
		close(entered)
		<-ctx.Done()
		close(left)
		return ctx.Err()
	}})
	c, err := Find(d, "/mnt/a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() { <-entered; cancel(errors.New("^C")) }()
	var v any
	if err := c.Unmount(ctx, &v); err == nil || err.Error() != "^C" {
		t.Errorf("Unmount: %v", err)
	}
	<-left // or the test hangs
}

func TestOneMountPerPath(t *testing.T) {
	d := dirs(t)
	start(t, d, "/mnt/a", &fake{})
	if s, err := Listen(d, "/mnt/a", &fake{}); !errors.Is(err, memferry.ErrInUse) {
		t.Errorf("second Listen: %v, %v", s, err)
	}
	start(t, d, "/mnt/b", &fake{})
	cs, err := All(d)
	if err != nil || len(cs) != 2 {
		t.Errorf("All: %d, %v", len(cs), err)
	}
}

// leaveDead leaves the socket of a process that was killed.
func leaveDead(t *testing.T, dir, mountpoint string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, socketName(mountpoint))
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	return path
}

func TestDeadSocketIsCleared(t *testing.T) {
	d := dirs(t)
	path := leaveDead(t, d[0], "/mnt/a")
	if _, err := Find(d, "/mnt/a"); !errors.Is(err, ErrNotMounted) {
		t.Errorf("Find: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the dead socket is still there: %v", err)
	}
	leaveDead(t, d[0], "/mnt/a")
	if cs, err := All(d); len(cs) != 0 || err != nil {
		t.Errorf("All: %d, %v", len(cs), err)
	}
	leaveDead(t, d[0], "/mnt/a")
	start(t, d, "/mnt/a", &fake{})
}

func TestForeignDirectoryIsRefused(t *testing.T) {
	d := dirs(t)[0]
	if err := os.Mkdir(d, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen([]string{d}, "/mnt/a", &fake{}); err == nil || !strings.Contains(err.Error(), "open to other users") {
		t.Errorf("Listen in a readable directory: %v", err)
	}
	link := d + "2"
	if err := os.Chmod(d, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(d, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen([]string{link}, "/mnt/a", &fake{}); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("Listen behind a link: %v", err)
	}
	if err := checkDir(d, os.Getuid()+1); err == nil || !strings.Contains(err.Error(), "another user") {
		t.Errorf("directory of another user: %v", err)
	}
	// The next candidate is taken instead.
	s := start(t, []string{link, d}, "/mnt/a", &fake{})
	if filepath.Dir(s.Path()) != d {
		t.Errorf("socket at %s", s.Path())
	}
}

func TestDirs(t *testing.T) {
	env := func(dir string) func(string) string {
		return func(k string) string {
			if k == "XDG_RUNTIME_DIR" {
				return dir
			}
			return ""
		}
	}
	for _, tc := range []struct {
		xdg  string
		uid  int
		want string
	}{
		{"", 0, "/run/memferry /tmp/memferry-0"},
		{"/run/user/5", 5, "/run/user/5/memferry /tmp/memferry-5"},
		{"/x", 5, "/x/memferry /run/user/5/memferry /tmp/memferry-5"},
		{"relative", 0, "/run/memferry /tmp/memferry-0"},
		{"/" + strings.Repeat("x", 90), 0, "/run/memferry /tmp/memferry-0"},
	} {
		if got := strings.Join(Dirs(env(tc.xdg), tc.uid), " "); got != tc.want {
			t.Errorf("Dirs(%q, %d) = %s, want %s", tc.xdg, tc.uid, got, tc.want)
		}
	}
}
