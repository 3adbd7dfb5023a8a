package region

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// TestPushStopped: a round of pushes that was stopped before it had sent all
// that was dirty has failed, whoever waits for it: pages were left.
func TestPushStopped(t *testing.T) {
	const chunkSize = 64 << 10
	f := newRemote(pattern(16*chunkSize, 1))
	r := open2(t, f, newLocal(16*chunkSize), Options{ChunkSize: chunkSize, Pull: PullNone, PushInterval: -1, PushIdle: -1, PushBacklog: -1})
	if _, err := r.WriteAt(pattern(16*chunkSize, 2), 0); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	r.changed = memferry.ErrChanged // found by the pull, say, while the round is under way
	r.mu.Unlock()
	if err := r.sendDirty(); !errors.Is(err, memferry.ErrChanged) {
		t.Errorf("the round: %v, with %d pages dirty", err, r.table.Counts().Dirty)
	}
	r.mu.Lock()
	r.changed = nil
	r.mu.Unlock()
}

// TestWriteRefusedDuringFetch: a write that the store has no room to note voids
// what is on its way for its pages. The pull fetches them once more.
func TestWriteRefusedDuringFetch(t *testing.T) {
	const chunk, size = 64 << 10, 2 * 64 << 10
	f := newRemote(pattern(size, 1))
	asked, release := make(chan struct{}, 100), make(chan struct{})
	f.hook = func(ctx context.Context, o op) error {
		if o.off < chunk {
			return nil
		}
		asked <- struct{}{}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	store := &fakeStore{state: make([]PageState, size/pageSize), full: true}
	r := open2(t, f, newLocal(size), Options{ChunkSize: chunk, Pull: PullNone, Store: store})
	if _, err := r.ReadAt(make([]byte, chunk), 0); err != nil {
		t.Fatal(err)
	}
	noted := func() bool { // only then does a write have to be noted as well
		store.mu.Lock()
		defer store.mu.Unlock()
		return store.state[chunk/pageSize-1] == Present
	}
	for end := testenv.Deadline(t, 10*time.Second); !noted(); time.Sleep(time.Millisecond) {
		if end.Err() != nil {
			t.Fatal("the store is not told of what is here")
		}
	}
	pulled := make(chan error, 1)
	go func() { pulled <- r.Pull(testenv.Deadline(t, 10*time.Second)) }()
	<-asked // the second chunk is on its way, the first is here
	if _, err := r.WriteAt(pattern(2*pageSize, 2), chunk-pageSize); !errors.Is(err, memferry.ErrNoSpace) {
		t.Errorf("write: %v, want no space", err)
	}
	close(release)
	if err := <-pulled; err != nil {
		t.Fatalf("pull: %v", err)
	}
	got := make([]byte, size)
	if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, pattern(size, 1)) {
		t.Errorf("wrong bytes (%v)", err)
	}
}
