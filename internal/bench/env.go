package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Env is where a run takes place.
type Env struct {
	Rounds  int   // measurements of each subject
	Size    int64 // bytes moved by the sequential scenarios
	Seconds int   // length of the timed scenarios
	Log     io.Writer
	Report  *Report

	only    *regexp.Regexp // scenarios to run; nil: all
	skipped []string       // names of those that it left out

	dir      string // in memory: storage must not matter
	bin      string // on disk: programs in memory would count as shared memory
	memferry string
	gonbd    string
	data     string // a file of Size random bytes
	sockets  int
}

// Options are what the caller chooses; the zero value is the full run.
type Options struct {
	Rounds  int
	Size    int64
	Seconds int
	// Scenario narrows the run to scenarios whose name it matches; nil: all.
	Scenario *regexp.Regexp
	Log      io.Writer // progress; nil discards
}

// Open builds the programs and makes the data.
func Open(ctx context.Context, o Options) (*Env, error) {
	e := &Env{Rounds: o.Rounds, Size: o.Size, Seconds: o.Seconds, Log: o.Log, Report: &Report{}, only: o.Scenario}
	if e.Rounds == 0 {
		e.Rounds = 5
	}
	if e.Size == 0 {
		e.Size = 1 << 30
	}
	if e.Seconds == 0 {
		e.Seconds = 2
	}
	if e.Log == nil {
		e.Log = io.Discard
	}
	dir, err := os.MkdirTemp("/dev/shm", "mfbench")
	if err != nil {
		if dir, err = os.MkdirTemp("", "mfbench"); err != nil {
			return nil, err
		}
	}
	e.dir = dir
	if e.bin, err = os.MkdirTemp("", "mfbench"); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	if err := e.prepare(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

// buildLimit bounds building the programs, with an empty cache.
const buildLimit = 10 * time.Minute

// Close removes what Open made, and unmounts what a step that was cut short
// left mounted there.
func (e *Env) Close() error {
	return errors.Join(e.detachMounts(), os.RemoveAll(e.dir), os.RemoveAll(e.bin))
}

// detachMounts unmounts everything below dir, the latest first. Mountpoints are
// the fifth field of a line of mountinfo (proc(5)).
func (e *Env) detachMounts() error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(text), "\n")
	slices.Reverse(lines)
	for _, line := range lines {
		f := strings.Fields(line)
		if len(f) > 4 && strings.HasPrefix(f[4], e.dir+"/") {
			err = errors.Join(err, unix.Unmount(f[4], unix.MNT_DETACH))
		}
	}
	return err
}

// wants reports whether one of the scenarios is to be run: what only others
// need has not to be set up.
func (e *Env) wants(scenarios ...string) bool {
	if e.only == nil {
		return true
	}
	found := false
	for _, s := range scenarios {
		switch {
		case e.only.MatchString(s):
			found = true
		case !slices.Contains(e.skipped, s):
			e.skipped = append(e.skipped, s)
		}
	}
	return found
}

// Skipped returns the names of the scenarios that Options.Scenario left out.
func (e *Env) Skipped() []string { return e.skipped }

func (e *Env) logf(format string, args ...any) {
	fmt.Fprintf(e.Log, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

func (e *Env) prepare(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, buildLimit)
	defer cancel()
	e.memferry = filepath.Join(e.bin, "memferry")
	if err := goBuild(ctx, "", e.memferry, "github.com/memferry/memferry/cmd/memferry", "CGO_ENABLED=0"); err != nil {
		return err
	}
	e.gonbd = filepath.Join(e.bin, "gonbd")
	if err := e.buildPeer(ctx, "gonbd", e.gonbd, "CGO_ENABLED=0"); err != nil {
		return err
	}
	e.data = filepath.Join(e.dir, "data")
	return e.fill(e.data)
}

// buildPeer builds a program of a module of its own.
func (e *Env) buildPeer(ctx context.Context, name, out string, env ...string) error {
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return fmt.Errorf("find the module: %w", err)
	}
	dir := filepath.Join(strings.TrimSpace(string(root)), "internal/bench/peers", name)
	return goBuild(ctx, dir, out, ".", append(env, "GOWORK=off")...)
}

// goBuild builds a program, in a directory unless that is empty.
func goBuild(ctx context.Context, dir, out, pkg string, env ...string) error {
	build := exec.CommandContext(ctx, "go", "build", "-o", out, pkg)
	build.Dir = dir
	build.Env = append(os.Environ(), env...)
	if text, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", filepath.Base(out), err, text)
	}
	return nil
}

// fill writes Size random bytes to a file.
func (e *Env) fill(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	src := rand.NewChaCha8([32]byte{1})
	_, err = io.Copy(f, io.LimitReader(src, e.Size))
	return errors.Join(err, f.Close())
}

// copyData makes a file of its own with the data.
func (e *Env) copyData(name string) (string, error) {
	path := filepath.Join(e.dir, name)
	in, err := os.Open(e.data)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := os.Create(path)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(out, in)
	return path, errors.Join(err, out.Close())
}

// endpoint is where a server listens.
type endpoint struct{ network, addr string }

// endpoint returns a new address: a socket path or a free TCP port.
func (e *Env) endpoint(network string) (endpoint, error) {
	if network == "unix" {
		e.sockets++
		return endpoint{network, filepath.Join(e.dir, "s"+strconv.Itoa(e.sockets))}, nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return endpoint{}, err
	}
	defer l.Close()
	return endpoint{network, l.Addr().String()}, nil
}

// uri names an export there.
func (p endpoint) uri(export string) string {
	if p.network == "unix" {
		return "nbd+unix:///" + url.PathEscape(export) + "?socket=" + p.addr
	}
	return "nbd://" + p.addr + "/" + url.PathEscape(export)
}

func (p endpoint) port() string { return p.addr[strings.LastIndexByte(p.addr, ':')+1:] }

// process is a program in the background.
type process struct {
	cmd  *exec.Cmd
	out  bytes.Buffer // read only after done
	done chan struct{}
	err  error
}

// start starts a program that ends with this one.
func start(name string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.WaitDelay = 5 * time.Second
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// patience is how long a program may take to get ready or to end.
const patience = time.Minute

// until waits for a condition while the process lives.
func (p *process) until(what string, ready func() bool) error {
	end := time.Now().Add(patience)
	for !ready() {
		select {
		case <-p.done:
			return fmt.Errorf("%s: %s ended: %w\n%s", what, p.cmd.Path, p.err, p.out.String())
		case <-time.After(200 * time.Microsecond):
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: %s was not ready within %v", what, p.cmd.Path, patience)
		}
	}
	return nil
}

// killWith kills the process when ctx ends before release is called: a read
// from the file system that it serves then fails, where it would hang for ever.
func (p *process) killWith(ctx context.Context) (release func() bool) {
	return context.AfterFunc(ctx, func() { _ = p.cmd.Process.Kill() })
}

// stop ends the process, kindly first.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may be gone
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// serverAt starts a server and waits until it listens.
func serverAt(at endpoint, name string, args ...string) (*process, error) {
	p, err := start(name, args...)
	if err != nil {
		return nil, err
	}
	err = p.until("listen on "+at.addr, func() bool {
		c, err := net.Dial(at.network, at.addr)
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
	if err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

// cpu returns the processor time that a process has used: fields 14 and 15 of
// /proc/pid/stat, in ticks of 1/100 s (proc(5)).
func (p *process) cpu() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold spaces.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/pid/stat has %d fields", len(fields))
	}
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}

// ownMemory returns the resident memory without shared memory, in bytes.
func (p *process) ownMemory() int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	var sum int64
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && (f[0] == "RssAnon:" || f[0] == "RssFile:") {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0
			}
			sum += kb << 10
		}
	}
	return sum
}

// run runs a program to its end and returns how long it took. The end of ctx
// kills it and the children it has.
func run(ctx context.Context, name string, args ...string) (time.Duration, []byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	// With its children, which would hold the pipes and outlive the benchmark.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second // one may have left the group
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	begin := time.Now()
	out, err := cmd.Output()
	took := time.Since(begin)
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return took, out, err
}

// isFUSE tells whether path lies on a FUSE file system.
func isFUSE(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.FUSE_SUPER_MAGIC
}

// rate is a throughput in MB/s.
func rate(metric string, n int64, took time.Duration) Value {
	return Value{metric, "MB/s", Higher, float64(n) / 1e6 / took.Seconds()}
}
