package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/control"
	"github.com/memferry/memferry/internal/lifecycle"
)

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// usageError is a command line that can't be right, whatever the machine.
type usageError struct {
	command string // as typed, such as "memferry mount"
	err     error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// remedyError is an error that knows what to do next.
type remedyError struct {
	err    error
	remedy string
}

func (e *remedyError) Error() string { return e.err.Error() + "; " + e.remedy }
func (e *remedyError) Unwrap() error { return e.err }

// withRemedy adds what to do next to err.
func withRemedy(err error, format string, a ...any) error {
	if err == nil {
		return nil
	}
	return &remedyError{err, fmt.Sprintf(format, a...)}
}

// withRemedyUnlessSaid adds what to do next to an err that does not tell.
func withRemedyUnlessSaid(err error, format string, a ...any) error {
	if err == nil || saysRemedy(err) {
		return err
	}
	return withRemedy(err, format, a...)
}

// saysRemedy tells whether err has the "; " in it that sets a remedy off.
func saysRemedy(err error) bool { return strings.Contains(err.Error(), "; ") }

// about prefixes err with the thing it concerns, once: packages below name
// their URL or path themselves where they know it.
func about(thing string, err error) error {
	if err == nil || strings.Contains(err.Error(), thing) {
		return err
	}
	return fmt.Errorf("%s: %w", thing, err)
}

// advise adds what to do next where err does not say so itself, for one whose
// text alone will reach the user.
func advise(err error) error {
	if err == nil || saysRemedy(err) {
		return err
	}
	if r := remedyFor(err); r != "" {
		return withRemedy(err, "%s", r)
	}
	return err
}

// statusOf is the exit status for err.
func statusOf(err error) int {
	var usage *usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		return exitUsage
	}
	return exitFailed
}

// report writes the one line that err is to the user.
func report(w io.Writer, err error) { fmt.Fprintln(w, line(err)) }

// line is "memferry: WHAT: WHY; REMEDY".
func line(err error) string {
	var usage *usageError
	if errors.As(err, &usage) {
		return fmt.Sprintf("memferry: %s; see `%s --help`", oneLine(err.Error()), usage.command)
	}
	return "memferry: " + oneLine(advise(err).Error())
}

// oneLine joins what errors.Join and programs put on several lines.
func oneLine(s string) string {
	parts := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	return strings.Join(parts, "; ")
}

// remedyFor is the advice for errors that carry none of their own. The order
// matters: an error may match several, and the first is the most telling.
func remedyFor(err error) string {
	var (
		daemon *lifecycle.SignalError
		lookup *net.DNSError
		call   *os.SyscallError
	)
	switch {
	case errors.Is(err, lifecycle.ErrDaemon), errors.As(err, &daemon):
		return ""
	case errors.Is(err, control.ErrNotMounted):
		return "`memferry status` lists the mounts of this user"
	case errors.Is(err, memferry.ErrChanged):
		return "unmount, and mount the remote as it is now (with another --cache directory)"
	case errors.Is(err, memferry.ErrCorrupt):
		return "its content can't be trusted; use another --cache directory, or remove this one"
	case errors.Is(err, memferry.ErrInUse), errors.Is(err, syscall.EADDRINUSE):
		return "end the process that holds it, or choose another"
	case errors.Is(err, memferry.ErrNoSpace), errors.Is(err, syscall.ENOSPC):
		return "free some space and try again"
	case errors.Is(err, memferry.ErrReadOnly), errors.Is(err, syscall.EROFS):
		return "use --read-only, or a writable source"
	case errors.As(err, &lookup):
		return "check the name of the host, and that this machine can resolve it"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return "give an address that this machine has; `ip address` lists them"
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return "check the address, and the route to it"
	case errors.Is(err, syscall.ENOTDIR):
		return "check the path: a part of it is no directory"
	case errors.Is(err, syscall.ECONNREFUSED), errors.As(err, &call) && call.Syscall == "connect" && errors.Is(err, fs.ErrNotExist):
		return "is the server running there? `memferry serve` starts one"
	case errors.Is(err, memferry.ErrTimeout), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "check the network and the server, or allow more with --io-timeout"
	case errors.Is(err, fs.ErrPermission):
		return "check the permissions, or run as a user that has them"
	case errors.Is(err, fs.ErrNotExist):
		return "check the name"
	}
	return ""
}
