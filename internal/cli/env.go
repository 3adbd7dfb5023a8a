// Package cli is the memferry command: its flags, its output, and how it wires
// backends, regions, servers and frontends together.
//
// Commands reach the process they run in through an [Env] alone, so that a
// test can run any of them with streams of its own.
package cli

import (
	"context"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/internal/control"
	"github.com/memferry/memferry/internal/lifecycle"
)

// Env is the world that a command runs in.
type Env struct {
	Args           []string // without the program's name
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	// Watch starts to listen for signals.
	Watch func(context.Context) *lifecycle.Signals
	// Readiness is the line to a parent that waits for this process.
	Readiness *lifecycle.Readiness
	// Backends opens URLs; nil means all that memferry brings.
	Backends *backend.Registry
}

// OSEnv is this process.
func OSEnv() Env {
	return Env{
		Args:      os.Args[1:],
		Stdin:     os.Stdin,
		Stdout:    os.Stdout,
		Stderr:    os.Stderr,
		Getenv:    os.Getenv,
		Watch:     lifecycle.Watch,
		Readiness: lifecycle.TakeReadiness(),
	}
}

func (e Env) withDefaults() Env {
	if e.Stdin == nil {
		e.Stdin = eof{}
	}
	if e.Stdout == nil {
		e.Stdout = io.Discard
	}
	if e.Stderr == nil {
		e.Stderr = io.Discard
	}
	if e.Getenv == nil {
		e.Getenv = func(string) string { return "" }
	}
	if e.Watch == nil {
		e.Watch = lifecycle.Unwatched
	}
	if e.Readiness == nil {
		e.Readiness = &lifecycle.Readiness{}
	}
	return e
}

// controlDirs are the places for control sockets.
func (e Env) controlDirs() []string { return control.Dirs(e.Getenv, os.Getuid()) }

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

// isTerminal reports whether w is a terminal that understands more than lines.
func (e Env) isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || e.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
