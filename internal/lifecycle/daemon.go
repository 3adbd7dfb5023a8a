package lifecycle

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// daemonEnv names, to the child, the file descriptor on which its parent waits
// for word that it is ready.
const daemonEnv = "MEMFERRY_READY_FD"

// maxReport bounds what the parent reads from its child, in bytes.
const maxReport = 64 << 10

// ErrDaemon is wrapped by the error of a child that said why it failed.
var ErrDaemon = errors.New("background process failed")

// childError is the child's own line, already worded for the user.
type childError struct{ line string }

func (e *childError) Error() string { return e.line }
func (e *childError) Unwrap() error { return ErrDaemon }

// Daemon describes a child to put into the background.
type Daemon struct {
	// Path is the executable; empty means this one.
	Path string
	// Args are its arguments, without the program's name.
	Args []string
	// Env is its environment; nil means this process's.
	Env []string
	// LogFile takes its standard output and error; empty discards them.
	LogFile string
}

// Start runs the child in a session of its own and returns once it has called
// [Readiness.Ready], with its process id and what it said, or has failed, with
// the child's own error. If ctx ends before that, the child is asked to end.
func (d Daemon) Start(ctx context.Context) (pid int, said string, err error) {
	out, err := d.openLog()
	if err != nil {
		return 0, "", err
	}
	defer out.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return 0, "", fmt.Errorf("readiness pipe: %w", err)
	}
	defer r.Close()
	cmd := d.command(out, w)
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, "", fmt.Errorf("start in the background: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	said, err = readReport(r)
	if err == nil {
		pid = cmd.Process.Pid
		return pid, said, cmd.Process.Release()
	}
	werr := cmd.Wait()
	if ctx.Err() != nil {
		return 0, "", context.Cause(ctx)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) && werr != nil {
		return 0, "", fmt.Errorf("background process ended before it was ready: %w", werr)
	}
	return 0, "", err
}

func (d Daemon) openLog() (*os.File, error) {
	if d.LogFile == "" {
		return os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	f, err := os.OpenFile(d.LogFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log file: %w", err)
	}
	return f, nil
}

func (d Daemon) command(out, ready *os.File) *exec.Cmd {
	path := d.Path
	if path == "" {
		// Not os.Executable: the file may have been replaced or removed since.
		path = "/proc/self/exe"
	}
	env := d.Env
	if env == nil {
		env = os.Environ()
	}
	// Not CommandContext: the child outlives ctx.
	cmd := exec.Command(path, d.Args...) //nolint:noctx // see above
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(env[:len(env):len(env)], daemonEnv+"=3")
	cmd.ExtraFiles = []*os.File{ready}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

// readReport reads "ok TEXT" or "error TEXT". The end of the pipe without
// either is io.ErrUnexpectedEOF: the child died.
func readReport(r io.Reader) (string, error) {
	line, err := bufio.NewReader(io.LimitReader(r, maxReport)).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("background process said nothing: %w", io.ErrUnexpectedEOF)
	}
	kind, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	text, err = strconv.Unquote(text)
	switch {
	case err != nil:
		return "", fmt.Errorf("background process said %q: %w", line, err)
	case kind == "ok":
		return text, nil
	}
	return "", &childError{text}
}

// Readiness is the child's side. The zero value, and nil, belong to a process
// that nobody waits for: every method does nothing.
type Readiness struct{ w *os.File }

// TakeReadiness returns the pipe that a parent left for this process, and
// hides it from processes that this one starts.
func TakeReadiness() *Readiness {
	fd, err := strconv.Atoi(os.Getenv(daemonEnv))
	if err != nil || fd < 3 {
		return &Readiness{}
	}
	os.Unsetenv(daemonEnv)
	syscall.CloseOnExec(fd)
	return &Readiness{w: os.NewFile(uintptr(fd), "readiness pipe")}
}

// Background reports whether a parent waits for this process.
func (r *Readiness) Background() bool { return r != nil && r.w != nil }

// Ready tells the parent to go, and prints text there. Calls after the first
// report do nothing.
func (r *Readiness) Ready(text string) { r.report("ok", text) }

// Failed gives the parent the line to print and fail with.
func (r *Readiness) Failed(line string) { r.report("error", line) }

func (r *Readiness) report(kind, text string) {
	if !r.Background() {
		return
	}
	// A parent that has gone away is no reason to fail.
	_, _ = fmt.Fprintf(r.w, "%s %q\n", kind, text)
	_ = r.w.Close()
	r.w = nil
}
