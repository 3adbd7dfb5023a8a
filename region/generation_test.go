package region

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/memferry/memferry"
)

// TestFenceFirst opens a region over the cache of a process that was killed
// while the remote had a write of it under way.
func TestFenceFirst(t *testing.T) {
	const size = 64 * pageSize
	first := newRemote(pattern(size, 1))
	first.tags, first.fences = true, true
	st := &fakeStore{state: make([]PageState, size/pageSize)}
	held := make(chan struct{})
	release := make(chan struct{})
	var once sync.Once
	first.setHook(func(_ context.Context, o op) error {
		if o.kind == "write" {
			if st.RemoteSession() != first.session {
				t.Error("written to in the name of a session that the store does not know")
			}
			once.Do(func() { close(held) })
			<-release
		}
		return nil
	})
	local := newLocal(size)
	r := open2(t, first, local, Options{Pull: PullNone, Store: st, PushInterval: -1, PushIdle: -1})
	t.Cleanup(func() { close(release) }) // before r is closed
	old := pattern(pageSize, 2)
	if _, err := r.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	go r.Push(context.Background()) //nolint:errcheck // ends with the region
	<-held

	// What is left when it is killed: nothing of a page that was not committed.
	second := newRemote(first.bytes())
	second.tags, second.fences = true, true
	first.mu.Lock()
	for w := range first.inFlight {
		second.late = append(second.late, w)
	}
	first.mu.Unlock()
	st2 := &fakeStore{state: slices.Clone(st.state), session: st.session}
	st2.gen, st2.pushing = st.Generation()
	if !st2.pushing {
		t.Error("the store does not know that the generation is about to change")
	}
	r2 := open2(t, second, newLocal(size), Options{Pull: PullNone, Store: st2, PushInterval: -1, PushIdle: -1})
	if got := kinds(second); got[0] != "fence" || got[1] != "generation" {
		t.Errorf("opened by %v; want a fence, then the generation", got)
	}
	if st2.session != second.session {
		t.Errorf("session %q is recorded, want %q", st2.session, second.session)
	}
	p := make([]byte, pageSize)
	if _, err := r2.ReadAt(p, 0); err != nil || !slices.Equal(p, second.bytes()[:pageSize]) {
		t.Errorf("read %v, equal to the remote %t", err, slices.Equal(p, second.bytes()[:pageSize]))
	}
	if _, err := r2.WriteAt(old, pageSize); err != nil {
		t.Fatal(err)
	}
	if err := r2.Push(deadline(t)); err != nil {
		t.Errorf("push after the fence: %v", err)
	}
}

func kinds(f *fakeRemote) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	ks := make([]string, 0, len(f.ops))
	for _, o := range f.ops {
		ks = append(ks, o.kind)
	}
	return ks
}

func TestFenceFails(t *testing.T) {
	f := newRemote(pattern(pageSize, 1))
	f.fences = true
	st := &fakeStore{state: make([]PageState, 1), session: "last"}
	f.setHook(func(_ context.Context, o op) error {
		if o.kind == "fence" {
			return memferry.ErrTimeout
		}
		return nil
	})
	if _, err := Open(context.Background(), f, newLocal(pageSize), Options{Store: st}); !errors.Is(err, memferry.ErrTimeout) {
		t.Errorf("open: %v", err)
	}
	if st.session != "last" {
		t.Errorf("session %q is recorded, though that of %q may still write", st.session, "last")
	}
}

// TestNothingSettlesDuringPush: a push that has begun, but found nothing dirty
// yet, may still change the remote. A tag from before that must not be adopted:
// the next one would pass for a change by somebody else.
func TestNothingSettlesDuringPush(t *testing.T) {
	remote := newRemote(pattern(4*pageSize, 1))
	remote.tags = true
	r := open2(t, remote, newLocal(4*pageSize), Options{Pull: PullNone, PushInterval: -1, PushIdle: -1})
	if _, err := r.WriteAt(pattern(pageSize, 2), 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Push(t.Context()); err != nil {
		t.Fatal(err)
	}
	own := func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.gen.own
	}
	if err := r.beginPushGeneration(); err != nil {
		t.Fatal(err)
	}
	r.settleGeneration()
	if !own() {
		t.Error("a tag was adopted while a push was under way")
	}
	r.pushRound() // ends it
	r.settleGeneration()
	if own() {
		t.Error("no tag was adopted at rest")
	}
}
