package integration

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/url"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
)

// buffer is a bytes.Buffer for the output of a process that is still running.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// run runs a program to its end and fails the test when it fails.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// try runs a program to its end and returns what it printed on either stream.
func try(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	// Not the test's context: clean-ups run programs too.
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// output runs a program to its end and returns its standard output.
func output(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(testenv.Deadline(t, hang), name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return out
}

// exitCode returns a finished command's exit status; -1 where it has none.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

// process is a program that runs until the test ends, or stop.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	out  buffer
	done chan struct{} // closed when the process has been waited for
	err  error         // set before done is closed
}

// start starts a program. Whatever the test does, it is gone when the test
// ends; its output is shown if the test failed.
func start(t testing.TB, name string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	// A child must not outlive a test binary that was killed.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.WaitDelay = 10 * time.Second
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("%s %s:\n%s", name, strings.Join(args, " "), tail(p.out.String(), 4000))
		}
	})
	return p
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// signal sends a signal, if the process is still there.
func (p *process) signal(s syscall.Signal) {
	select {
	case <-p.done:
	default:
		_ = p.cmd.Process.Signal(s) // it may end this very moment
	}
}

// stop asks the process to end as a person would with Ctrl-C, and kills it when
// it doesn't. It returns the process's error.
func (p *process) stop() error {
	p.t.Helper()
	p.signal(syscall.SIGINT)
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		p.t.Errorf("%s did not end within a minute of SIGINT", p.cmd.Path)
		p.kill()
	}
	return p.err
}

// kill ends the process at once.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		p.t.Errorf("%s did not end within a minute of SIGKILL: is it in D state?", p.cmd.Path)
	}
}

// eventually waits until f returns nil, while p lives.
func (p *process) eventually(what string, f func() error) {
	p.t.Helper()
	end := time.Now().Add(hang)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-p.done:
			p.t.Fatalf("%s: %v; the process ended: %v\n%s", what, err, p.err, p.out.String())
		case <-time.After(pause):
		}
		if time.Now().After(end) {
			p.t.Fatalf("%s: %v\n%s", what, err, p.out.String())
		}
	}
}

// accepts tells whether something listens at an address.
func accepts(network, addr string) func() error {
	return func() error {
		c, err := net.DialTimeout(network, addr, 5*time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	}
}

// freePort returns a TCP port on the loopback interface that was free just now.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// unixURI is the NBD URI of an export behind a UNIX socket.
func unixURI(socket, export string) string {
	return "nbd+unix:///" + url.PathEscape(export) + "?socket=" + socket
}

// server is a running "memferry serve".
type server struct {
	*process
	socket string
}

// uri names one of the server's exports.
func (s *server) uri(export string) string { return unixURI(s.socket, export) }

// serve starts "memferry serve" on a UNIX socket.
func serve(t testing.TB, args ...string) *server {
	t.Helper()
	return serveAt(t, testenv.TempSocket(t), args...)
}

// serveAt does so on a given socket.
func serveAt(t testing.TB, socket string, args ...string) *server {
	t.Helper()
	args = append([]string{"serve", "--listen", "nbd+unix:///?socket=" + socket}, args...)
	s := &server{start(t, memferry, args...), socket}
	s.eventually("memferry serve", accepts("unix", socket))
	return s
}

// serveTCP starts "memferry serve" on a TCP port and returns its address.
func serveTCP(t testing.TB, args ...string) (p *process, addr string) {
	t.Helper()
	addr = "127.0.0.1:" + strconv.Itoa(freePort(t))
	p = start(t, memferry, append([]string{"serve", "--listen", "nbd://" + addr}, args...)...)
	p.eventually("memferry serve", accepts("tcp", addr))
	return p, addr
}

// statusField returns a size from /proc/pid/status (proc(5)), in bytes; 0 where
// it is not there.
func statusField(status []byte, field string) int64 {
	for line := range strings.Lines(string(status)) {
		rest, ok := strings.CutPrefix(line, field+":")
		if !ok {
			continue
		}
		kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		if err != nil {
			return 0
		}
		return kb << 10
	}
	return 0
}
