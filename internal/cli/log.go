package cli

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
)

// logSink is where log lines go. A progress bar puts itself in between while
// it owns the terminal, so that lines scroll above it.
type logSink struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *logSink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

// swap replaces the target and returns the old one.
func (s *logSink) swap(w io.Writer) io.Writer {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.w
	s.w = w
	return old
}

// enum is a flag with a fixed set of values.
type enum struct {
	value   string
	allowed []string
}

func (e *enum) String() string { return e.value }
func (e *enum) Type() string   { return strings.Join(e.allowed, "|") }

func (e *enum) Set(s string) error {
	for _, a := range e.allowed {
		if s == a {
			e.value = s
			return nil
		}
	}
	return fmt.Errorf("want %s", orList(e.allowed))
}

func orList(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

type logFlags struct {
	format, level enum
	verbose       bool
}

func (f *logFlags) logger(w io.Writer) *slog.Logger {
	var level slog.Level
	// The flag allows only what this knows.
	_ = level.UnmarshalText([]byte(f.level.value))
	if f.verbose {
		level = slog.LevelDebug
	}
	o := &slog.HandlerOptions{Level: level}
	if f.format.value == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
