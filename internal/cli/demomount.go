package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/memferry/memferry/frontend/fuse"
	"github.com/memferry/memferry/internal/control"
)

// mountSubject mounts in a process of its own, so that the application, which
// is this process, can do with the file what it likes.
func (d *demo) mountSubject(ctx context.Context, direct bool) (subject, error) {
	path := filepath.Join(d.dir, "mounted.img")
	args := []string{"mount", "--log-level", d.logs.level.value, d.url, path}
	if direct {
		args = append(args, "--direct")
	}
	cmd := exec.Command("/proc/self/exe", args...) //nolint:noctx // ended by umount, or by abandon
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+d.dir)
	// A mount must not outlive a demonstration that was killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	said := &lastLine{}
	cmd.Stderr = said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &mountSubject{cmd: cmd, path: path, said: said, dirs: d.demoDirs()}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		werr := cmd.Wait()
		if line := said.String(); line != "" {
			return nil, errors.New(strings.TrimPrefix(line, "memferry: mount: "))
		}
		return nil, fmt.Errorf("mount: %w", werr)
	}
	if s.File, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		s.abandon()
		return nil, err
	}
	if s.control, err = s.find(ctx); err != nil {
		s.abandon()
		return nil, err
	}
	return s, nil
}

// demoDirs are where the mount's control socket may be.
func (d *demo) demoDirs() []string {
	return control.Dirs(func(k string) string {
		if k == "XDG_RUNTIME_DIR" {
			return d.dir
		}
		return d.env.Getenv(k)
	}, os.Getuid())
}

type mountSubject struct {
	*os.File
	cmd     *exec.Cmd
	path    string
	said    *lastLine
	dirs    []string
	control *control.Client
}

// find returns the control client, which is there as soon as the mount is.
func (s *mountSubject) find(ctx context.Context) (*control.Client, error) {
	for {
		c, err := control.Find(s.dirs, s.path)
		if !errors.Is(err, control.ErrNotMounted) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (s *mountSubject) local() float64 {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var st mountStatus
	if s.control.Status(ctx, &st) != nil || st.Region == nil {
		return 0
	}
	return percent(st.Region.Present, st.Region.Size)
}

func (s *mountSubject) finish(ctx context.Context) (int64, error) {
	if err := s.Close(); err != nil {
		s.abandon()
		return 0, err
	}
	var sum unmountSummary
	if err := s.control.Unmount(ctx, &sum); err != nil {
		s.abandon()
		return 0, err
	}
	if err := s.cmd.Wait(); err != nil {
		return 0, fmt.Errorf("%w: %s", err, s.said)
	}
	return sum.Total, nil
}

// abandonTimeout is how long a mount may take to end by itself.
const abandonTimeout = 5 * time.Second

// abandon makes the mount end after a failure, politely first.
func (s *mountSubject) abandon() {
	// Errors below have no better remedy than the next step.
	if s.File != nil {
		_ = s.Close()
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(abandonTimeout):
		_ = s.cmd.Process.Kill()
		<-done
	}
	_, _ = fuse.ClearStale(s.path)
}

// lastLine keeps the last line written to it.
type lastLine struct {
	mu   sync.Mutex
	text string
}

func (l *lastLine) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	const limit = 4096
	l.text += string(p)
	if i := strings.LastIndexByte(strings.TrimRight(l.text, "\n"), '\n'); i >= 0 {
		l.text = l.text[i+1:]
	}
	if len(l.text) > limit {
		l.text = l.text[:limit]
	}
	return len(p), nil
}

func (l *lastLine) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(l.text)
}
