package nbd

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	testSession = "0123456789abcdef0123456789abcdef"
	oneOfIts    = testSession + ".1"
)

// holding is a backend whose writes wait until they are released.
type holding struct {
	*plain
	begun   chan struct{} // one for each write
	release chan struct{}
}

func newHolding(size int) *holding {
	return &holding{newPlain(size), make(chan struct{}, 16), make(chan struct{})}
}

func (h *holding) WriteAt(p []byte, off int64) (int, error) {
	h.begun <- struct{}{}
	<-h.release
	return h.plain.WriteAt(p, off)
}

// fence asks for one and returns the reply.
func (w *wire) fence(export, prefix string) []optionReply {
	w.t.Helper()
	w.hello()
	if w.final(optStructuredReply, nil) != repAck {
		w.t.Fatal("no structured replies")
	}
	return w.option(optListMetaContext, appendMetaRequest(nil, metaRequest{export, []string{contextFence + prefix}}))
}

func isUp(r []optionReply) bool { return len(r) == 2 && r[1].typ == repAck }

// TestFence ends a connection with one write at the backend, and others that
// were received but have no slot.
func TestFence(t *testing.T) {
	b := newHolding(1 << 16)
	s := startServer(t, ServerOptions{MaxInFlight: 1}, Export{Name: "x", Backend: b})
	first := connect(t, s)
	first.enter("x", true, contextBase, contextSession+oneOfIts)
	const writes = 64
	for i := range uint64(writes) {
		first.send(request{typ: cmdWrite, cookie: i, offset: i * 512, length: 512}, bytes.Repeat([]byte{1}, 512)...)
	}
	<-b.begun
	other := connect(t, s)
	other.enter("x", true, contextSession+strings.Repeat("other", 8))
	noID := connect(t, s)
	noID.enter("x", true)

	var up sync.WaitGroup
	var done int64
	up.Go(func() {
		r := connect(t, s).fence("x", testSession)
		if !isUp(r) {
			t.Errorf("replies %+v", r)
			return
		}
		if b.bytes(0, 1)[0] != 1 {
			t.Error("the fence is up before the first write is")
		}
		done = b.writes.Load()
	})
	if _, err := first.nc.Read(make([]byte, 1)); err == nil {
		t.Error("an answer, instead of the end of the connection")
	}
	close(b.release)
	up.Wait()
	first.ends() //nolint:errcheck // that it does is what matters
	// The reader may have been on its way to the backend with one more.
	if n := b.writes.Load(); n != done || n > 2 {
		t.Errorf("%d writes of %d, %d of them once the fence was up", n, writes, n-done)
	}
	other.ask(request{typ: cmdWrite, length: 512}, make([]byte, 512)...)
	noID.ask(request{typ: cmdWrite, length: 512}, make([]byte, 512)...)
}

// TestFenceTakesTooLong has a backend that does not end the write in time.
func TestFenceTakesTooLong(t *testing.T) {
	b := newHolding(1 << 16)
	s := startServer(t, ServerOptions{FenceTimeout: time.Millisecond}, Export{Name: "x", Backend: b})
	first := connect(t, s)
	first.enter("x", true, contextSession+oneOfIts)
	first.send(request{typ: cmdWrite, length: 512}, make([]byte, 512)...)
	<-b.begun
	w := connect(t, s)
	r := w.fence("x", testSession)
	if last := r[len(r)-1]; last.typ != repErrPolicy || !strings.Contains(string(last.data), "under way") {
		t.Errorf("reply %#x %q", last.typ, last.data)
	}
	close(b.release)
	first.ends() //nolint:errcheck // that it does is what matters
	r = w.option(optListMetaContext, appendMetaRequest(nil, metaRequest{"x", []string{contextFence + testSession}}))
	if !isUp(r) {
		t.Errorf("asked again: %+v", r)
	}
}

func TestFenceWhatIsMeant(t *testing.T) {
	s := startServer(t, ServerOptions{},
		Export{Name: "x", Backend: newPlain(1 << 16)}, Export{Name: "y", Backend: newPlain(1 << 16)})
	w := connect(t, s)
	w.enter("x", true, contextBase, contextSession+oneOfIts)
	for _, c := range []struct{ export, prefix string }{
		{"y", testSession},              // of another export
		{"x", testSession + ".2"},       // another connection
		{"x", testSession[:minFence-1]}, // too short to be meant
		{"x", ""},
		{"x", testSession + strings.Repeat("x", maxConnID)},
		{"x", testSession + " "},
	} {
		connect(t, s).fence(c.export, c.prefix)
		if a := w.ask(request{typ: cmdWrite, length: 512}, make([]byte, 512)...); a.errno != 0 {
			t.Fatalf("after a fence of %q on %s: %v", c.prefix, c.export, a.errno)
		}
	}
	// A context is told of its extents like a generation.
	if a := w.ask(request{typ: cmdBlockStatus, length: 4096}); a.errno != 0 {
		t.Errorf("block status: %v", a.errno)
	}
	// Ids are not for others to see.
	for _, q := range [][]string{nil, {namespaceExper}, {contextSession}, {contextFence}} {
		l := connect(t, s).hello()
		l.final(optStructuredReply, nil)
		for _, r := range l.option(optListMetaContext, appendMetaRequest(nil, metaRequest{"x", q})) {
			if strings.Contains(string(r.data), testSession) {
				t.Errorf("LIST_META_CONTEXT %q tells %q", q, r.data)
			}
		}
	}
	if r := connect(t, s).fence("x", oneOfIts); !isUp(r) {
		t.Errorf("replies %+v", r)
	}
	w.ends() //nolint:errcheck // that it does is what matters
}
