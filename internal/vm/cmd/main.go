// Command vm runs a test binary, or a shell, in a virtual machine with a
// kernel that has nbd and ublk.
//
//	vm run BINARY ARGS...   as "go test -exec" calls it; the status is BINARY's
//	vm shell [BINARY]       a shell on the console; BINARY, if any, is in /test
//	vm prepare              download the kernel, so that run needs no network
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/memferry/memferry/internal/vm"
)

func main() {
	if vm.IsInit() {
		vm.Init()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	status, err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		status = 1
	}
	os.Exit(status)
}

func run(ctx context.Context, args []string) (int, error) {
	if len(args) == 0 {
		return 0, errors.New("usage: vm run BINARY ARGS... | vm shell | vm prepare")
	}
	c := vm.Config{Stdout: os.Stdout, Stderr: os.Stderr, Env: environment()}
	switch verb, args := args[0], args[1:]; {
	case verb == "prepare" && len(args) == 0:
		return 0, vm.Prepare(ctx)
	case verb == "shell" && len(args) == 0:
		c.Stdin = os.Stdin
		return vm.Run(ctx, c)
	case verb == "run" && len(args) > 0:
		dir, err := os.Getwd()
		if err != nil {
			return 0, err
		}
		c.Program, c.Dir = args[0], dir
		c.Args, c.Timeout = testArgs(args[1:])
		return vm.Run(ctx, c)
	}
	return 0, fmt.Errorf("can't do %q", strings.Join(args, " "))
}

// testArgs drops what names files of the host, and finds the timeout.
func testArgs(args []string) (kept []string, timeout time.Duration) {
	for _, a := range args {
		// The go command's record of the files that a test opens, for its cache.
		if strings.HasPrefix(a, "-test.testlogfile=") || strings.HasPrefix(a, "-test.gocoverdir=") {
			continue
		}
		if v, ok := strings.CutPrefix(a, "-test.timeout="); ok {
			timeout, _ = time.ParseDuration(v)
		}
		kept = append(kept, a)
	}
	return kept, timeout
}

// environment is what is passed on into the machine.
func environment() []string {
	// In the machine everything can be had, so nothing may be skipped there.
	env := []string{"MEMFERRY_VM=1"}
	for _, e := range os.Environ() {
		if strings.HasPrefix(e, "MEMFERRY_") || strings.HasPrefix(e, "GODEBUG=") || strings.HasPrefix(e, "GOTRACEBACK=") {
			env = append(env, e)
		}
	}
	return env
}
