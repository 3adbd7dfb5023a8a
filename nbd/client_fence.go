package nbd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/memferry/memferry"
)

// fencePause is how long the client waits before it asks again for a fence
// that took the server too long.
const fencePause = 100 * time.Millisecond

// errFenceBusy says that the server has not ended a session's requests yet.
var errFenceBusy = errors.New("requests of an earlier session are still under way at the server")

// fences keeps the client's writes in order across broken connections: see
// docs/adr/0004-write-fence.md.
//
// A write that may have been sent, and was not answered, is in doubt from the
// moment its connection breaks, or its caller gives it up, until it is
// answered, or the connection is fenced. While its caller waits it is not
// repeated; afterwards, no write that overlaps it is sent.
type fences struct {
	session string       // of the client, random
	last    atomic.Int64 // number of the last connection
	loose   atomic.Int64 // len(given)

	mu      sync.Mutex
	broken  map[*clientConn]struct{} // with writes in doubt
	given   map[*call]*clientConn    // up by their callers, and in doubt
	settled chan struct{}            // closed and replaced when some are no longer
}

func newFences() *fences {
	return &fences{
		session: newSession(), broken: map[*clientConn]struct{}{}, given: map[*call]*clientConn{},
		settled: make(chan struct{}),
	}
}

func newSession() string {
	var b [minFence / 2]byte
	rand.Read(b[:]) //nolint:errcheck // never fails: crypto/rand
	return fmt.Sprintf("%x", b)
}

// dialing says who a new connection is, and which ones it replaces.
type dialing struct {
	id    string
	fence []*clientConn
}

func (f *fences) dialing() dialing {
	f.mu.Lock()
	defer f.mu.Unlock()
	return dialing{fmt.Sprintf("%s.%x", f.session, f.last.Add(1)), slices.Collect(maps.Keys(f.broken))}
}

// broke takes the requests of a broken connection off it. Writes in doubt stay
// until it has been fenced.
func (f *fences) broke(cc *clientConn) {
	if !cc.fenceable || !cc.doubts() {
		f.fenced(cc)
		return
	}
	f.mu.Lock()
	f.broken[cc] = struct{}{}
	f.mu.Unlock()
	cc.finishAll(func(k *call) bool { return !k.inDoubt() })
}

// fenced ends the doubts about connections.
func (f *fences) fenced(conns ...*clientConn) {
	for _, cc := range conns {
		cc.finishAll(func(*call) bool { return true })
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, cc := range conns {
		delete(f.broken, cc)
	}
	f.settleLocked(func(_ *call, of *clientConn) bool { return slices.Contains(conns, of) })
}

// doubting reports whether writes wait for a connection to fence their own.
func (f *fences) doubting() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.broken) > 0
}

// giveUp notes that nobody waits for a write any more, which may have been
// sent on cc.
func (f *fences) giveUp(k *call, cc *clientConn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.given[k] = cc
	f.loose.Store(int64(len(f.given)))
}

// answered notes the late answer to a write that was given up.
func (f *fences) answered(k *call) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.settleLocked(func(other *call, _ *clientConn) bool { return other == k })
}

func (f *fences) settleLocked(which func(*call, *clientConn) bool) {
	before := len(f.given)
	maps.DeleteFunc(f.given, which)
	if len(f.given) == before {
		return
	}
	f.loose.Store(int64(len(f.given)))
	close(f.settled)
	f.settled = make(chan struct{})
}

// wait returns a channel to wait for before req may be sent, or nil.
func (f *fences) wait(req request) <-chan struct{} {
	if !req.modifies() || f.loose.Load() == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for k := range f.given {
		if k.req.offset < req.offset+uint64(req.length) && req.offset < k.req.offset+uint64(k.req.length) {
			return f.settled
		}
	}
	return nil
}

// doubts reports whether a broken connection may have a write under way.
func (cc *clientConn) doubts() bool {
	cc.mu.Lock()
	defer cc.mu.Unlock()
	cc.settleSendingLocked()
	for _, k := range cc.calls {
		if k.inDoubt() {
			return true
		}
	}
	return false
}

// inDoubt reports whether the server may have got the call, a write.
func (k *call) inDoubt() bool { return k.req.modifies() && k.state != callQueued }

// Session implements memferry.Fencer.
func (c *Client) Session() string { return c.fences.session }

// Fence implements memferry.Fencer. While the session's requests go on, it
// asks again until ctx is done.
func (c *Client) Fence(ctx context.Context, session string) error {
	if !c.info.fences {
		return fmt.Errorf("nbd: %s: the server knows no fences: %w", c.uri, memferry.ErrNotSupported)
	}
	if _, ok := connID(contextFence+session, contextFence); !ok {
		return fmt.Errorf("nbd: %s: %q is no session", c.uri, session)
	}
	for {
		err := c.query(ctx, func(h *clientHandshake) error { return h.fence(session) })
		if !errors.Is(err, errFenceBusy) {
			return err
		}
		select {
		case <-time.After(fencePause):
		case <-ctx.Done():
			return err
		case <-c.ctx.Done():
			return memferry.ErrClosed
		}
	}
}

// fenceBroken has the server end the connections that this one replaces, if it
// knows how to.
func (h *clientHandshake) fenceBroken() error {
	for _, cc := range h.as.fence {
		if !h.info.fences {
			break
		}
		if err := h.fence(cc.id); err != nil {
			return err
		}
	}
	return nil
}

// fence has the server end the connections whose id begins with prefix.
func (h *clientHandshake) fence(prefix string) error {
	b := appendOption(nil, optListMetaContext, appendMetaRequest(nil, metaRequest{h.uri.Export, []string{contextFence + prefix}}))
	if _, err := h.nc.Write(b); err != nil {
		return err
	}
	up := false
	r, data, err := h.each(optListMetaContext, func(typ uint32, data []byte) error {
		if typ != repMetaContext {
			return protocolErrorf("reply %d to %s", typ, optionName(optListMetaContext))
		}
		m, err := parseMetaReply(data)
		up = up || m.name == contextFence+prefix
		return err
	})
	switch {
	case err != nil:
		return err
	case r.typ == repErrPolicy:
		return fmt.Errorf("%w (server says: %q)", errFenceBusy, cutString(string(data), maxString))
	case r.isError():
		return h.refused(r.typ, data)
	case !up:
		return protocolErrorf("no answer to a fence")
	}
	return nil
}
