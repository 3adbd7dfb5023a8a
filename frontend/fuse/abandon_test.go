package fuse

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// blocked does not return from Sync or WriteZeroes until released, as a client
// whose server is away.
type blocked struct {
	*memory
	held    chan struct{} // receives one for each call
	release chan struct{}
}

func newBlocked(t *testing.T) *blocked {
	t.Helper()
	return &blocked{memory: newTestMemory(t, testSize), held: make(chan struct{}, 100), release: make(chan struct{})}
}

func (s *blocked) Sync() error {
	s.held <- struct{}{}
	<-s.release
	return s.memory.Sync()
}

func (s *blocked) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	s.held <- struct{}{}
	<-s.release
	return s.memory.WriteZeroes(off, n, flags)
}

func TestKilledCallerOfABlockedBackendEnds(t *testing.T) {
	for _, name := range []string{"write", "punch"} {
		t.Run(name, func(t *testing.T) {
			s := newBlocked(t)
			d := mountAt(t, s, t.TempDir(), Options{})
			t.Cleanup(func() { close(s.release) }) // before the device is closed
			cmd := helper(t, name, d.Path())
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			receive(t, "the call", s.held)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			select {
			case err := <-ended:
				if err == nil {
					t.Error("the process ended well")
				}
			case <-time.After(hang):
				t.Error("the killed process is still there")
			}
		})
	}
}

func TestAbortGivesUpABlockedSync(t *testing.T) {
	testenv.Root(t)
	s := newBlocked(t)
	d := mountAt(t, s, t.TempDir(), Options{})
	cmd := helper(t, "write", d.Path())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	receive(t, "sync", s.held)
	if err := d.Abort(); err != nil && !errors.Is(err, memferry.ErrInUse) {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), hang)
	defer cancel()
	if err := d.Wait(ctx); err != nil {
		t.Errorf("the mount does not end: %v", err)
	}
	close(s.release)
	cmd.Wait() //nolint:errcheck // whatever it makes of it
}

func TestUncancelledIsBounded(t *testing.T) {
	u := newUncancelled()
	release := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{}, maxUncancelled+1)
	results := make(chan error, maxUncancelled+1)
	for range maxUncancelled {
		go func() {
			results <- u.call(ctx, func() error { started <- struct{}{}; <-release; return nil })
		}()
	}
	for range maxUncancelled {
		receive(t, "start", started)
	}
	go func() { results <- u.call(ctx, func() error { started <- struct{}{}; return nil }) }()
	cancel()
	for range maxUncancelled + 1 {
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want a cancellation", err)
		}
	}
	if len(started) > 0 {
		t.Error("one call too many was made")
	}
	close(release)
	for range maxUncancelled { // every place is free again
		u <- struct{}{}
	}
}
