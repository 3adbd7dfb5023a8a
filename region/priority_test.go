package region

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"testing"
)

func TestPriorityOrder(t *testing.T) {
	const chunkSize, chunks = 64 << 10, 1024
	f := newRemote(pattern(chunks*chunkSize, 1))
	r := open2(t, f, newLocal(chunks*chunkSize), Options{ChunkSize: chunkSize, Priority: func(c int64) int {
		return int(c * 37 % chunks)
	}})
	if err := r.Pull(deadline(t)); err != nil {
		t.Fatal(err)
	}
	// Requests in flight may overtake each other, but no more than that.
	latest := -1
	for i, o := range f.calls("read") {
		p := int(o.off / chunkSize * 37 % chunks)
		if p >= chunks/2 {
			latest = i
		}
		if i < chunks/8 && p < chunks/2 {
			t.Fatalf("request %d has priority %d", i, p)
		}
	}
	if latest > chunks*7/8 {
		t.Fatalf("request %d is one of high priority", latest)
	}
}

// TestPriorityIsAskedAgain holds the documentation to what happens: chunks that
// could not be fetched are ranked anew, one call at a time.
func TestPriorityIsAskedAgain(t *testing.T) {
	const chunkSize, chunks = 64 << 10, 64
	f := newRemote(pattern(chunks*chunkSize, 1))
	var refused atomic.Bool
	f.hook = func(_ context.Context, o op) error {
		if o.kind == "read" && o.off == 0 && refused.CompareAndSwap(false, true) {
			return io.ErrUnexpectedEOF
		}
		return nil
	}
	var running atomic.Int32
	var mu sync.Mutex
	asked := make(map[int64]int)
	r := open2(t, f, newLocal(chunks*chunkSize), Options{ChunkSize: chunkSize, Priority: func(c int64) int {
		if running.Add(1) > 1 {
			t.Error("called concurrently")
		}
		mu.Lock()
		asked[c]++
		mu.Unlock()
		running.Add(-1)
		return int(-c)
	}})
	if err := r.Pull(deadline(t)); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(asked) != chunks || asked[0] < 2 {
		t.Fatalf("%d of %d chunks were ranked, the one that failed %d times", len(asked), chunks, asked[0])
	}
}
