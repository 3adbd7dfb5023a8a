package uffd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/memferry/memferry"
)

// sealed can't be written to.
type sealed struct{ memferry.Backend }

func (sealed) ReadOnly() bool { return true }

// TestUntracked: a kernel that can't tell what was written loses nothing, since
// it gets nothing to lose.
func TestUntracked(t *testing.T) {
	want := noise(t, 1<<20)
	memory(t, source(t, want), Options{}) // skips where there is none
	was := canTrack
	defer func() { canTrack = was }()
	canTrack = func() error { return fmt.Errorf("WP_ASYNC: %w", memferry.ErrNotSupported) }

	m, err := Open(context.Background(), source(t, want), Options{})
	if !errors.Is(err, memferry.ErrNotSupported) || !strings.Contains(err.Error(), "Options.ReadOnly") {
		t.Errorf("memory to be written to: %v", err)
	}
	if m != nil {
		closed(t, m)
	}
	m, err = OpenURL(t.Context(), "file:"+sourceFile(t, want), Options{})
	if !errors.Is(err, memferry.ErrNotSupported) {
		t.Errorf("memory to be written to, with a helper: %v", err)
	}
	if m != nil {
		closed(t, m)
	}
	got := make([]byte, len(want))
	for name, open := range map[string]func() *Memory{
		"read-only memory":           func() *Memory { return memory(t, source(t, want), Options{ReadOnly: true}) },
		"memory of a sealed source":  func() *Memory { return memory(t, sealed{source(t, want)}, Options{}) },
		"read-only memory, a helper": func() *Memory { return helped(t, "file:"+sourceFile(t, want), Options{ReadOnly: true}) },
	} {
		m := open()
		if _, err := m.ReadAt(got, 0); err != nil || string(got) != string(want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := m.Dirty(); !errors.Is(err, memferry.ErrNotSupported) {
			t.Errorf("%s: dirty: %v", name, err)
		}
		closed(t, m)
	}
}
