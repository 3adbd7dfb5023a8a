package fuse

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/testenv"
)

// TestKilledWhileAskingItself kills a process that waits for an answer that it
// should give itself. Nothing but the end of its descriptors ends that wait.
func TestKilledWhileAskingItself(t *testing.T) {
	testenv.FUSE(t)
	path := filepath.Join(t.TempDir(), "file")
	cmd, _, said := start(t, "askself", path)
	if said != "syncing" {
		t.Fatal(said)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait() //nolint:errcheck // it was killed
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the process is still there")
		unix.Unmount(path, unix.MNT_FORCE) //nolint:errcheck // busy, but that ends the process
		<-ended
	}
	if cleared, err := ClearStale(path); err != nil || !cleared {
		t.Errorf("ClearStale: %v, %v", cleared, err)
	}
}

// TestOutside looks at the table of descriptors of such a thread.
func TestOutside(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var inside unix.Stat_t
	err = outside(func() error { return unix.Fstat(int(f.Fd()), &inside) })
	if !errors.Is(err, unix.EBADF) {
		t.Errorf("a descriptor of the process on the thread outside: %v, want EBADF", err)
	}
	if _, err := f.Stat(); err != nil {
		t.Errorf("the descriptor in the process: %v", err)
	}
}
