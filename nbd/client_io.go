package nbd

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	if k.deadline.IsZero() {
		k.deadline = time.Now().Add(c.opt.IOTimeout)
		k.timer.Reset(c.opt.IOTimeout)
	} else {
		k.timer.Reset(time.Until(k.deadline))
	}
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
	k.slot = slots
	if c.stats.inFlight.Add(1) == 1 && c.down.Load() {
		c.wanted()
	}
	c.stats.requests.Add(1)
	keeps, err := c.repeat(ctx, k, class)
	if !keeps {
		c.release(k)
	}
	return err
}

// release gives a call's slot to another one.
func (c *Client) release(k *call) {
	c.stats.inFlight.Add(-1)
	<-k.slot
}

// repeat sends k until there is an answer. It also reports whether k was given
// up, and keeps its slot until the server has answered it.
func (c *Client) repeat(ctx context.Context, k *call, class memferry.Class) (keeps bool, err error) {
	for {
		keeps, err = c.attempt(ctx, k, class)
		if !errors.Is(err, errConnLost) {
			return keeps, err
		}
		if !time.Now().Before(k.deadline) {
			return keeps, c.timedOut(k, err)
		}
		// A flush on another connection would say nothing of what the server
		// may have lost; a read that was streamed in part is its caller's.
		if k.req.typ == cmdFlush && (k.on != nil || c.losses.unreported()) || k.sink != nil && k.got > 0 {
			return keeps, err
		}
		c.stats.resent.Add(1)
		k.got, k.err, k.extents = 0, nil, nil
	}
}

func (c *Client) attempt(ctx context.Context, k *call, class memferry.Class) (keeps bool, err error) {
	for {
		cc, changed, err := c.pick(k, class)
		if err != nil {
			return false, err
		}
		if wait := c.fences.wait(k.req); wait != nil {
			changed = wait
		} else if cc != nil {
			room, err := cc.submit(k)
			switch {
			case err != nil: // it has just broken and will be gone in a moment
				changed = c.change(cc)
			case room != nil:
				changed = room
			default:
				return c.await(ctx, cc, k)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-k.timer.C:
			return false, c.timedOut(k, nil)
		case <-c.ctx.Done():
			return false, memferry.ErrClosed
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

func (c *Client) await(ctx context.Context, cc *clientConn, k *call) (keeps bool, err error) {
	var why error
	select {
	case err := <-k.done:
		c.measure(k, err)
		return false, c.answer(k, err)
	case <-ctx.Done():
		why = context.Cause(ctx)
	case <-k.timer.C:
		why = c.timedOut(k, nil)
	case <-c.ctx.Done():
		why = memferry.ErrClosed
	}
	answered, keeps, err := cc.abandon(k)
	if answered && !errors.Is(err, errConnLost) {
		return keeps, c.answer(k, err)
	}
	return keeps, why
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
	err := fmt.Errorf("nbd: %s: no answer to %s within %v, is the server up? (%w)", c.uri, commandName(k.req.typ), c.opt.IOTimeout, memferry.ErrTimeout)
	if last != nil {
		return fmt.Errorf("%w; last: %v", err, last) //nolint:errorlint // context alone
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
	if err := c.read(ctx, p[:n], off); err != nil {
		return 0, err
	}
	return n, eof
}

// read reads whole blocks, of which only what is wanted reaches memory.
func (c *Client) read(ctx context.Context, p []byte, off int64) error {
	from, to := c.widen(off, int64(len(p)))
	return split(from, to-from, c.maxRequest, func(at, n int64) error {
		lo, hi := max(at, off), min(at+n, off+int64(len(p)))
		q := p[lo-off : hi-off]
		err := c.request(ctx, request{typ: cmdRead, offset: uint64(at), length: uint32(n)}, func(k *call) {
			k.dst, k.from, k.to = q, uint64(lo), uint64(hi)
		}, nil)
		if err == nil {
			c.stats.readBytes.Add(hi - lo)
		}
		return err
	})
}

// maxParallel is how many parts of a long call are under way at once.
const maxParallel = 8

// split calls f for pieces of at most limit bytes; see parallel.
func split(off, n, limit int64, f func(off, n int64) error) error {
	if n <= limit {
		return f(off, n)
	}
	return parallel((n+limit-1)/limit, func(i int64) error {
		return f(off+i*limit, min(limit, n-i*limit))
	})
}

// parallel calls f for each number below n, some at once. After an error it
// begins no more of them, and returns it once those under way have ended.
func parallel(n int64, f func(i int64) error) error {
	if n == 1 {
		return f(0)
	}
	errs := make(chan error, maxParallel)
	running := 0
	var first error
	collect := func() {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
		running--
	}
	for i := int64(0); i < n && first == nil; {
		if running == maxParallel {
			collect()
			continue
		}
		running++
		at := i
		go func() { errs <- f(at) }()
		i++
	}
	for running > 0 {
		collect()
	}
	return first
}

// WriteAt implements memferry.Backend.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return c.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext implements memferry.ContextWriter. Where the server has
// blocks larger than a byte, those that a write covers in part are read first;
// no other write of this client comes between.
func (c *Client) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := c.checkWrite("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := c.write(ctx, p, off); err != nil {
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
	return c.modify(context.Background(), request{typ: cmdTrim}, off, end-off)
}

// modify performs requests that change whole blocks and have no payload.
func (c *Client) modify(ctx context.Context, req request, off, n int64) error {
	hold, err := c.blocks.lock(ctx, c, off, n, time.Now().Add(c.opt.IOTimeout))
	if err != nil {
		return err
	}
	defer c.blocks.unlock(hold)
	return split(off, n, maxZero, func(at, n int64) error {
		part := req
		part.offset, part.length = uint64(at), uint32(n)
		return c.request(ctx, part, nil, nil)
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
		if err := c.modify(context.Background(), request{flags: wire, typ: cmdWriteZeroes}, head, tail-head); err != nil {
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
