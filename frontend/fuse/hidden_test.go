package fuse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/testenv"
)

func gone(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

func TestSweepTakesOnlyTheDead(t *testing.T) {
	parent := t.TempDir()
	alive, err := makeHidden(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer alive.unlock()
	full := filepath.Join(parent, hiddenPrefix+"full")
	foreign := filepath.Join(parent, "memferry-other")
	file := filepath.Join(parent, hiddenPrefix+"file")
	for _, dir := range []string{filepath.Join(full, "x"), foreign} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var dead []string
	for i := range 3 {
		dead = append(dead, filepath.Join(parent, fmt.Sprint(hiddenPrefix, i)))
		if err := os.Mkdir(dead[i], 0o700); err != nil {
			t.Fatal(err)
		}
	}
	sweepHidden(parent)
	for _, path := range dead {
		gone(t, path)
	}
	for _, path := range []string{alive.path, full, foreign, file} {
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
}

// TestKilledBeforeTheBind: the next mount removes the directory that a killed
// one had mounted and not hidden yet.
func TestKilledBeforeTheBind(t *testing.T) {
	testenv.Root(t)
	testenv.FUSE(t)
	left := filepath.Join(hiddenParent(), fmt.Sprint(hiddenPrefix, os.Getpid()))
	if err := os.Mkdir(left, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { detach(left); os.Remove(left) }) //nolint:errcheck // most likely swept
	cmd, _, _ := start(t, "serve", left)                // mounted on it, and alive
	sweepHidden(hiddenParent())
	if !stillMounted(left) {
		t.Fatal("the directory of a living mount was swept")
	}
	cmd.Process.Kill() //nolint:errcheck // it lives
	cmd.Wait()         //nolint:errcheck // it was killed
	mountAt(t, newTestMemory(t, testSize), filepath.Join(t.TempDir(), "file"), Options{})
	gone(t, left)
}

func TestKilledMountsFileGoesWithTheNext(t *testing.T) {
	testenv.Root(t)
	testenv.FUSE(t)
	kill := func(path string) {
		t.Helper()
		cmd, _, _ := start(t, "serve", path)
		cmd.Process.Kill() //nolint:errcheck // it lives
		cmd.Wait()         //nolint:errcheck // it was killed
	}
	path := filepath.Join(t.TempDir(), "file")
	kill(path)
	if err := mountAt(t, newTestMemory(t, testSize), path, Options{}).Close(); err != nil {
		t.Fatal(err)
	}
	gone(t, path)

	kill(path)
	if cleared, err := ClearStale(path); !cleared || err != nil {
		t.Errorf("clear: %v, %v", cleared, err)
	}
	gone(t, path)

	// What the user made or touched stays.
	kill(path)
	if err := detach(path); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if err := os.Chtimes(path, now, now); err != nil {
		t.Fatal(err)
	}
	if err := mountAt(t, newTestMemory(t, testSize), path, Options{}).Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
	unix.Unlink(path) //nolint:errcheck // in a temporary directory
}
