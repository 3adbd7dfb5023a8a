package integration

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/internal/testenv"
)

// handler runs the handler for microVMs of a region, and returns its socket.
func handler(t *testing.T, url string, flags ...string) (*process, string) {
	t.Helper()
	testenv.Kernel(t, "userfaultfd")
	testenv.Root(t) // the machines' faults are those of system calls too
	testenv.Program(t, "python3")
	socket := testenv.TempSocket(t)
	p := start(t, memferry, append(append([]string{"uffd-handler", "--socket", socket}, flags...), url)...)
	p.eventually("it listens", accepts("unix", socket))
	return p, socket
}

// machine runs a scenario of testdata/vmm.py, which knows nothing of memferry.
func machine(t *testing.T, socket, want, scenario string) *process {
	t.Helper()
	return start(t, "python3", "testdata/vmm.py", socket, want, scenario)
}

func (p *process) wantsOK() {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(2 * time.Minute):
		p.t.Fatal("the machine hangs")
	}
	if p.err != nil || !strings.HasSuffix(p.out.String(), "ok\n") {
		p.t.Fatalf("machine: %v\n%s", p.err, tail(p.out.String(), 2000))
	}
}

// holey is a snapshot as they are: data, and runs of zeroes.
func holey(t *testing.T) (path string) {
	want := pattern(60, 24*mib+4096)
	clear(want[3*mib : 9*mib])
	clear(want[20*mib+4096 : 20*mib+8192])
	return file(t, "snapshot", want)
}

// TestHandler: a process that speaks Firecracker's hand-over gets its memory, by
// demand and ahead of it, from a file and from a server behind a link; also
// several at once, and one after the other.
func TestHandler(t *testing.T) {
	path := holey(t)
	s := serve(t, "disk="+path)
	_, far := link(t, s.socket, netsim.Link{RTT: 10 * time.Millisecond})
	for name, url := range map[string]string{"file": path, "far": unixURI(far, "disk")} {
		for _, pull := range []string{"full", "demand", "none"} {
			if name == "far" && pull == "none" {
				continue // 6000 round trips
			}
			t.Run(name+" "+pull, func(t *testing.T) {
				p, socket := handler(t, url, "--pull", pull)
				machine(t, socket, path, "everything").wantsOK()
				a, b := machine(t, socket, path, "balloon"), machine(t, socket, path, "old")
				a.wantsOK()
				b.wantsOK()
				p.settled()
			})
		}
	}
}

// settled ends the handler, which must then have nothing left to do.
func (p *process) settled() {
	p.t.Helper()
	p.eventually("the machines are gone", func() error {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid()))
		if err != nil {
			return err
		}
		for _, fd := range fds {
			name, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", p.pid(), fd.Name()))
			if strings.Contains(name, "userfaultfd") {
				return fmt.Errorf("descriptor %s is still %s", fd.Name(), name)
			}
		}
		return nil
	})
	if err := p.stop(); err != nil {
		p.t.Errorf("handler: %v\n%s", err, tail(p.out.String(), 2000))
	}
}

// TestHandlerRemoves: what a machine removes while large pieces are being copied
// into it stays removed.
func TestHandlerRemoves(t *testing.T) {
	path := holey(t)
	for range 5 {
		p, socket := handler(t, path, "--chunk", "4M", "--rate", "40M/s")
		machine(t, socket, path, "balloon").wantsOK()
		p.settled()
	}
}

// TestHandlerBadClients: rubbish costs whoever sends it its connection, and
// nobody else anything.
func TestHandlerBadClients(t *testing.T) {
	path := holey(t)
	p, socket := handler(t, path)
	m := machine(t, socket, path, "balloon")
	machine(t, socket, path, "rubbish").wantsOK()
	m.wantsOK()
	machine(t, socket, path, "everything").wantsOK()
	p.settled()
	if n := strings.Count(p.out.String(), "level=WARN") + strings.Count(p.out.String(), "level=ERROR"); n < 10 || n > 40 {
		t.Errorf("%d complaints:\n%s", n, p.out.String())
	}
}

// TestHandlerKill: a machine that is killed is noticed, and with --once ends
// the handler.
func TestHandlerKill(t *testing.T) {
	path := holey(t)
	p, socket := handler(t, path, "--once", "--pull", "demand")
	m := machine(t, socket, path, "hang")
	m.eventually("it runs", func() error { return says(m, "ready") })
	m.kill()
	select {
	case <-p.done:
	case <-time.After(hang):
		t.Fatal("the handler goes on")
	}
	if p.err != nil {
		t.Errorf("handler: %v\n%s", p.err, p.out.String())
	}
}

func says(p *process, what string) error {
	if !strings.Contains(p.out.String(), what) {
		return fmt.Errorf("it has not said %q", what)
	}
	return nil
}

// TestHandlerSettles: a handler that is asked to end first gives its machines
// all they miss, also where nothing was to be fetched ahead.
func TestHandlerSettles(t *testing.T) {
	path := holey(t)
	p, socket := handler(t, path, "--pull", "none")
	cmd := exec.Command("python3", "testdata/vmm.py", socket, path, "orphan")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	p.eventually("the machine runs", func() error {
		if !strings.Contains(out.String(), "ready") {
			return fmt.Errorf("it says %q", out.String())
		}
		return nil
	})
	if err := p.stop(); err != nil {
		t.Errorf("handler: %v\n%s", err, p.out.String())
	}
	if _, err := io.WriteString(in, "go on\n"); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.HasSuffix(out.String(), "ok\n") {
		t.Errorf("the machine: %v\n%s", err, out.String())
	}
	if _, err := os.Stat(filepath.Clean(socket)); !os.IsNotExist(err) {
		t.Errorf("the socket is still there (%v)", err)
	}
}

// TestHandlerSourceGone: what can't be fetched in time fails where it is
// touched, with SIGBUS, and nothing hangs; once the source is back, so is the
// handler.
func TestHandlerSourceGone(t *testing.T) {
	testenv.Kernel(t, "uffd-poison")
	path := holey(t)
	socket := testenv.TempSocket(t)
	s := serveAt(t, socket, "disk="+path)
	p, vm := handler(t, s.uri("disk"), "--pull", "none", "--io-timeout", "1s")
	s.kill()
	m := machine(t, vm, path, "everything")
	select {
	case <-m.done:
	case <-time.After(hang):
		t.Fatal("the machine hangs")
	}
	status, ok := m.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() || status.Signal() != syscall.SIGBUS {
		t.Errorf("the machine: %v\n%s", m.err, m.out.String())
	}
	serveAt(t, socket, "disk="+path)
	machine(t, vm, path, "everything").wantsOK()
	p.settled()
}
