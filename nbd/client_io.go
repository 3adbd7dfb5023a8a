package nbd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/memferry/memferry"
)

// maxZero bounds one request that zeroes or trims, and maxStatus one for block
// status: lengths on the wire have 32 bits.
const (
	maxZero   = 1 << 30
	maxStatus = 1 << 31
)

// do performs a request: it sends k, again if the connection is lost, and
// returns the server's answer.
func (c *Client) do(ctx context.Context, k *call) error {
	if ctx.Err() != nil { // a select might choose the free slot
		return context.Cause(ctx)
	}
	class := memferry.ClassOf(ctx)
	slots := c.slots
	if class == memferry.ClassDemand {
		slots = c.demandSlots
	}
	deadline := time.Now().Add(c.opt.IOTimeout)
	k.timer.Reset(c.opt.IOTimeout)
	defer k.timer.Stop()
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-k.timer.C:
		return c.timedOut(k, nil)
	case <-c.ctx.Done():
		return memferry.ErrClosed
	}
	c.stats.inFlight.Add(1)
	defer func() {
		c.stats.inFlight.Add(-1)
		<-slots
	}()
	c.stats.requests.Add(1)
	for {
		err := c.attempt(ctx, k, class)
		if !errors.Is(err, errConnLost) {
			return err
		}
		if time.Now().After(deadline) {
			return c.timedOut(k, err)
		}
		// A flush on another connection would say nothing of what the server
		// may have lost; a read that was streamed in part is its caller's.
		if k.req.typ == cmdFlush && c.lost.Load() > c.reported.Load() || k.sink != nil && k.got > 0 {
			return err
		}
		c.stats.resent.Add(1)
		k.got, k.err, k.extents = 0, nil, nil
	}
}

func (c *Client) attempt(ctx context.Context, k *call, class memferry.Class) error {
	for {
		cc, changed, err := c.pick(class, int64(k.req.length))
		if err != nil {
			return err
		}
		if wait := c.fences.wait(k.req); wait != nil {
			changed = wait
		} else if cc != nil {
			if err := cc.submit(k); err == nil {
				return c.await(ctx, cc, k)
			}
			// It has just broken and will be gone in a moment.
			changed = c.change(cc)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-k.timer.C:
			return c.timedOut(k, nil)
		case <-c.ctx.Done():
			return memferry.ErrClosed
		}
	}
}

// change returns a channel that is closed when cc is no longer in use.
func (c *Client) change(cc *clientConn) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.Contains(c.conns, cc) {
		return c.changed
	}
	gone := make(chan struct{})
	close(gone)
	return gone
}

func (c *Client) await(ctx context.Context, cc *clientConn, k *call) error {
	var why error
	select {
	case err := <-k.done:
		c.measure(k, err)
		return c.answer(k, err)
	case <-ctx.Done():
		why = context.Cause(ctx)
	case <-k.timer.C:
		why = c.timedOut(k, nil)
	case <-c.ctx.Done():
		why = memferry.ErrClosed
	}
	if answered, err := cc.abandon(k); answered {
		if err = c.answer(k, err); !errors.Is(err, errConnLost) {
			return err
		}
	}
	if !k.abandoned {
		k.abandoned = true // not to be used again
	}
	return why
}

// measure keeps a smoothed round trip of small requests.
func (c *Client) measure(k *call, err error) {
	if err != nil || k.req.length > memferry.PageSize {
		return
	}
	old, now := c.stats.rtt.Load(), int64(time.Since(k.sentAt))
	if old != 0 {
		now = old + (now-old)/8
	}
	c.stats.rtt.Store(now)
}

func (c *Client) answer(k *call, err error) error {
	if err == nil || errors.Is(err, errConnLost) {
		if errors.Is(err, errConnLost) && c.ctx.Err() != nil {
			return memferry.ErrClosed
		}
		return err
	}
	return fmt.Errorf("nbd: %s: %s of %d bytes at %d: %w", c.uri, commandName(k.req.typ), k.req.length, k.req.offset, err)
}

func (c *Client) timedOut(k *call, last error) error {
	c.mu.Lock()
	if last == nil {
		last = c.lastErr
	}
	c.mu.Unlock()
	err := fmt.Errorf("nbd: %s: no answer to %s within %v: %w", c.uri, commandName(k.req.typ), c.opt.IOTimeout, memferry.ErrTimeout)
	if last != nil {
		return fmt.Errorf("%w (last: %v)", err, last) //nolint:errorlint // context alone
	}
	return err
}

// request runs one call from the pool, which set fills in and get reads.
func (c *Client) request(ctx context.Context, req request, set, get func(*call)) error {
	k := c.calls.Get().(*call)
	k.req = req
	if set != nil {
		set(k)
	}
	err := c.do(ctx, k)
	if get != nil {
		get(k)
	}
	if !k.abandoned {
		*k = call{done: k.done, timer: k.timer}
		c.calls.Put(k)
	}
	return err
}

// ReadAt implements memferry.Backend.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return c.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext implements memferry.ContextReader.
func (c *Client) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	n, eof := memferry.CheckRead(off, len(p), c.info.Size)
	if n == 0 {
		if c.ctx.Err() != nil {
			return 0, memferry.ErrClosed
		}
		return 0, eof
	}
	p = p[:n]
	if !c.aligned(off, int64(n)) {
		from, to := c.widen(off, int64(n))
		b := make([]byte, to-from)
		if err := c.readAligned(ctx, b, from); err != nil {
			return 0, err
		}
		copy(p, b[off-from:])
		return n, eof
	}
	if err := c.readAligned(ctx, p, off); err != nil {
		return 0, err
	}
	return n, eof
}

func (c *Client) aligned(off, n int64) bool { return off%c.align == 0 && n%c.align == 0 }

// widen returns the blocks that a range touches.
func (c *Client) widen(off, n int64) (from, to int64) {
	return off / c.align * c.align, (off + n + c.align - 1) / c.align * c.align
}

func (c *Client) readAligned(ctx context.Context, p []byte, off int64) error {
	return c.split(off, int64(len(p)), c.maxRequest, func(at, n int64) error {
		q := p[at-off:][:n]
		err := c.request(ctx, request{typ: cmdRead, offset: uint64(at), length: uint32(n)}, func(k *call) { k.dst = q }, nil)
		if err == nil {
			c.stats.readBytes.Add(n)
		}
		return err
	})
}

// split calls f for pieces of at most limit bytes, at once where there are
// several, and returns an error if one has failed.
func (c *Client) split(off, n, limit int64, f func(off, n int64) error) error {
	if n <= limit {
		return f(off, n)
	}
	const maxParallel = 8
	errs := make(chan error, maxParallel)
	running := 0
	var first error
	collect := func() {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
		running--
	}
	for end := off + n; off < end && first == nil; {
		if running == maxParallel {
			collect()
			continue
		}
		at, k := off, min(limit, end-off)
		running++
		go func() { errs <- f(at, k) }()
		off += k
	}
	for running > 0 {
		collect()
	}
	return first
}

// ReadStream implements memferry.StreamReader.
func (c *Client) ReadStream(ctx context.Context, off, n int64, sink func(off, n int64, p []byte) error) error {
	if err := memferry.CheckRange("read", off, n, c.info.Size); err != nil {
		return err
	}
	if !c.aligned(off, n) {
		p := make([]byte, n)
		if _, err := c.ReadAtContext(ctx, p, off); err != nil {
			return err
		}
		return sink(off, n, p)
	}
	for n > 0 {
		k := min(n, c.maxRequest)
		if err := c.streamOne(ctx, off, k, sink); err != nil {
			return err
		}
		off += k
		n -= k
	}
	return nil
}

// streamOne is one streamed request. After a lost connection it asks for what
// has not been delivered, since the sink must not see bytes twice.
func (c *Client) streamOne(ctx context.Context, off, n int64, sink func(off, n int64, p []byte) error) error {
	deadline := time.Now().Add(c.opt.IOTimeout)
	todo := []memferry.Extent{{Off: off, Len: n}}
	for len(todo) > 0 {
		want := todo[0]
		if !c.aligned(want.Off, want.Len) {
			// The server cut a block in two, and the connection broke there.
			if err := c.ReadStream(ctx, want.Off, want.Len, sink); err != nil {
				return err
			}
			todo = todo[1:]
			continue
		}
		var got []memferry.Extent
		err := c.request(ctx, request{typ: cmdRead, offset: uint64(want.Off), length: uint32(want.Len)}, func(k *call) {
			k.sink = func(off, n int64, p []byte) error {
				err := sink(off, n, p)
				if err == nil {
					got = append(got, memferry.Extent{Off: off, Len: n})
				}
				return err
			}
		}, nil)
		switch {
		case err == nil:
			c.stats.readBytes.Add(want.Len)
			todo = todo[1:]
		case errors.Is(err, errConnLost) && time.Now().Before(deadline):
			todo = append(missing(want, got), todo[1:]...)
		default:
			return err
		}
	}
	return nil
}

// missing returns the parts of want that are not in got.
func missing(want memferry.Extent, got []memferry.Extent) []memferry.Extent {
	slices.SortFunc(got, func(a, b memferry.Extent) int { return int(min(max(a.Off-b.Off, -1), 1)) })
	var out []memferry.Extent
	at := want.Off
	for _, g := range got {
		if g.Off > at {
			out = append(out, memferry.Extent{Off: at, Len: g.Off - at})
		}
		at = max(at, g.Off+g.Len)
	}
	if end := want.Off + want.Len; at < end {
		out = append(out, memferry.Extent{Off: at, Len: end - at})
	}
	return out
}

// WriteAt implements memferry.Backend.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return c.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext implements memferry.ContextWriter. Where the server has
// blocks larger than a byte, a write that covers one in part reads it first;
// no other write of this client comes between.
func (c *Client) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := c.checkWrite("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if c.aligned(off, int64(len(p))) {
		c.rmw.RLock()
		defer c.rmw.RUnlock()
		if err := c.writeAligned(ctx, p, off); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	c.rmw.Lock()
	defer c.rmw.Unlock()
	from, to := c.widen(off, int64(len(p)))
	b := make([]byte, to-from)
	if err := c.readAligned(ctx, b, from); err != nil {
		return 0, err
	}
	copy(b[off-from:], p)
	if err := c.writeAligned(ctx, b, from); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *Client) checkWrite(op string, off, n int64) error {
	if c.ctx.Err() != nil {
		return memferry.ErrClosed
	}
	if err := memferry.CheckRange(op, off, n, c.info.Size); err != nil {
		return err
	}
	if c.ReadOnly() {
		return fmt.Errorf("nbd: %s: export is %w", c.uri, memferry.ErrReadOnly)
	}
	return nil
}

func (c *Client) writeAligned(ctx context.Context, p []byte, off int64) error {
	return c.split(off, int64(len(p)), c.maxRequest, func(at, n int64) error {
		q := p[at-off:][:n]
		err := c.modify(ctx, request{typ: cmdWrite, offset: uint64(at), length: uint32(n)}, q)
		if err == nil {
			c.stats.writeBytes.Add(n)
		}
		return err
	})
}

// modify performs one request that changes data.
func (c *Client) modify(ctx context.Context, req request, payload []byte) error {
	return c.request(ctx, req, func(k *call) { k.payload = payload }, nil)
}

// Sync implements memferry.Backend by FLUSH. See ErrSyncLost. Where the server
// has no FLUSH it promises nothing, and Sync has nothing to add.
func (c *Client) Sync() error {
	if c.ctx.Err() != nil {
		return memferry.ErrClosed
	}
	seen := c.reported.Load()
	if err := c.syncLost(seen); err != nil {
		return err
	}
	if !c.info.Flags.Has(FlagSendFlush) {
		return nil
	}
	covered := c.acked.Load()
	err := c.request(context.Background(), request{typ: cmdFlush}, nil, nil)
	// Also after success: it may be that of a server that has restarted since
	// the writes.
	if lost := c.syncLost(seen); lost != nil {
		return lost
	}
	if err == nil {
		raise(&c.flushed, covered)
	}
	return err
}

// syncLost returns ErrSyncLost if writes may have been lost that the first
// seen reports did not tell of.
func (c *Client) syncLost(seen int64) error {
	lost := c.lost.Load()
	if lost <= seen {
		return nil
	}
	raise(&c.reported, lost)
	return fmt.Errorf("nbd: %s: %w", c.uri, ErrSyncLost)
}

// raise makes a at least n.
func raise(a *atomic.Int64, n int64) {
	for old := a.Load(); old < n && !a.CompareAndSwap(old, n); old = a.Load() {
	}
}

// Trim implements memferry.Trimmer. Blocks that are covered in part stay.
func (c *Client) Trim(off, n int64) error {
	if err := c.checkWrite("trim", off, n); err != nil {
		return err
	}
	end := (off + n) / c.align * c.align
	off = (off + c.align - 1) / c.align * c.align
	if off >= end {
		return nil
	}
	c.rmw.RLock()
	defer c.rmw.RUnlock()
	return c.split(off, end-off, maxZero, func(at, n int64) error {
		return c.modify(context.Background(), request{typ: cmdTrim, offset: uint64(at), length: uint32(n)}, nil)
	})
}

// WriteZeroes implements memferry.ZeroWriter.
func (c *Client) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	if err := c.checkWrite("write zeroes", off, n); err != nil || n == 0 {
		return err
	}
	if flags&memferry.ZeroFast != 0 && !c.info.Flags.Has(FlagSendFastZero) {
		return fmt.Errorf("nbd: %s: fast zero: %w", c.uri, memferry.ErrNotSupported)
	}
	var wire uint16
	if flags&memferry.ZeroNoHole != 0 {
		wire |= cmdFlagNoHole
	}
	if flags&memferry.ZeroFast != 0 {
		wire |= cmdFlagFastZero
	}
	head := min((off+c.align-1)/c.align*c.align, off+n)
	tail := max((off+n)/c.align*c.align, head)
	if tail > head {
		c.rmw.RLock()
		err := c.split(head, tail-head, maxZero, func(at, n int64) error {
			return c.modify(context.Background(), request{flags: wire, typ: cmdWriteZeroes, offset: uint64(at), length: uint32(n)}, nil)
		})
		c.rmw.RUnlock()
		if err != nil {
			return err
		}
	}
	for _, part := range [][2]int64{{off, head}, {tail, off + n}} {
		if part[1] > part[0] {
			if _, err := c.WriteAt(make([]byte, part[1]-part[0]), part[0]); err != nil {
				return err
			}
		}
	}
	return nil
}

// Extents implements memferry.Extenter by BLOCK_STATUS of base:allocation.
func (c *Client) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	if err := memferry.CheckRange("extents", off, n, c.info.Size); err != nil {
		return nil, err
	}
	from, to := c.widen(off, n)
	to = min(to, from+maxStatus)
	end := min(off+n, to)
	var extents []statusExtent
	err := c.request(ctx, request{typ: cmdBlockStatus, offset: uint64(from), length: uint32(to - from)}, nil,
		func(k *call) { extents = k.extents })
	if err != nil {
		return nil, err
	}
	var out []memferry.Extent
	for at := from; len(extents) > 0 && at < end && len(out) < memferry.MaxExtents; extents = extents[1:] {
		next := at + int64(extents[0].length)
		lo, hi := max(at, off), min(next, end)
		if hi > lo {
			out = append(out, memferry.Extent{Off: lo, Len: hi - lo, Flags: extentFlags(extents[0].status)})
		}
		at = next
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("nbd: %s: %w", c.uri, protocolErrorf("no extents at %d", off))
	}
	return out, nil
}

func extentFlags(status uint32) memferry.ExtentFlags {
	var f memferry.ExtentFlags
	if status&stateHole != 0 {
		f |= memferry.ExtentHole
	}
	if status&stateZero != 0 {
		f |= memferry.ExtentZero
	}
	return f
}
