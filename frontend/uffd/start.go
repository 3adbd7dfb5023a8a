package uffd

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"syscall"

	"github.com/memferry/memferry"
)

// command is the program that serves the memory of those that can't serve it
// themselves.
const command = "memferry"

// HelperCommand is the argument with which OpenURL starts the memferry command;
// it is for that command alone.
const HelperCommand = "uffd-helper"

// mainHelps is set once this program has shown that its main calls Helper:
// started once more, it will call it again.
var mainHelps atomic.Bool

// helperCommand finds what to start as a helper.
func helperCommand() (*exec.Cmd, error) {
	if mainHelps.Load() {
		// Not os.Executable: the file may have been replaced since.
		cmd := exec.Command("/proc/self/exe")
		cmd.Args[0] = os.Args[0]
		return cmd, nil
	}
	path, err := exec.LookPath(command)
	if err != nil { // also for one in the working directory, which nobody named
		return nil, fmt.Errorf("no process to serve the memory: %w (%w); call uffd.Helper first thing in main, or install the %s command in PATH",
			memferry.ErrNotSupported, err, command)
	}
	return exec.Command(path, HelperCommand), nil
}

func startHelper() (*remote, error) {
	cmd, err := helperCommand()
	if err != nil {
		return nil, err
	}
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	r := &remote{conn: ours, cmd: cmd, exited: make(chan struct{}), ended: make(chan struct{}), calls: make(map[uint64]chan *message)}
	r.cmd.ExtraFiles = []*os.File{theirs} // descriptor 3
	r.cmd.Env = append(os.Environ(), helperEnv+"="+strconv.Itoa(3))
	r.cmd.Stderr = os.Stderr
	// Signals of a terminal are for the owner, which closes the memory.
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := r.cmd.Start(); err != nil {
		ours.close()
		return nil, fmt.Errorf("start the helper: %w", err)
	}
	go func() {
		defer close(r.exited)
		_ = r.cmd.Wait() // its end is seen on the socket
	}()
	return r, nil
}

// protocol is the version of what owner and helper say to each other, and of
// what lies in the memory that they share. They can be different programs.
const protocol = 2

// errProtocol is about two programs of different versions.
func errProtocol(theirs int) error {
	return fmt.Errorf("the helper speaks version %d of the protocol, this program %d: %w; update the %s command in PATH, or call uffd.Helper first thing in main",
		theirs, protocol, memferry.ErrNotSupported, command)
}
