package nbd

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/memferry/memferry"
)

// Some servers take whole blocks only. A read asks for whole blocks and drops
// what is not wanted of them. A write reads those that it covers in part, and
// sends them, changed, in one run with the rest.

// widen returns the blocks that a range touches.
func (c *Client) widen(off, n int64) (from, to int64) {
	return off / c.align * c.align, (off + n + c.align - 1) / c.align * c.align
}

// blockLocks keep what changes blocks apart from what reads, changes and writes
// them. Only who changes a block in part excludes others, and them only from
// that block. It is first come, first served, so nobody waits for ever.
type blockLocks struct {
	mu    sync.Mutex
	holds []*blockHold // in the order in which they came; bounded by the callers
}

// blockHold is a range of whole blocks, of which the first or the last may be
// changed in part.
type blockHold struct {
	from, to int64
	partial  []int64 // offsets of blocks, at most two
	done     chan struct{}
}

func (h *blockHold) conflicts(o *blockHold) bool {
	within := func(r *blockHold) func(int64) bool {
		return func(block int64) bool { return r.from <= block && block < r.to }
	}
	return slices.ContainsFunc(h.partial, within(o)) || slices.ContainsFunc(o.partial, within(h))
}

// lock waits until nobody who came earlier is in the way of a change of n bytes
// at off. Servers without blocks need no lock, and get nil.
func (l *blockLocks) lock(ctx context.Context, c *Client, off, n int64, deadline time.Time) (*blockHold, error) {
	if c.align == 1 {
		return nil, nil
	}
	h := &blockHold{done: make(chan struct{})}
	h.from, h.to = c.widen(off, n)
	if last := h.to - c.align; off+n < h.to && last > h.from {
		h.partial = append(h.partial, last)
	}
	if off > h.from || off+n < min(h.to, h.from+c.align) {
		h.partial = append(h.partial, h.from)
	}
	var before []*blockHold
	l.mu.Lock()
	for _, o := range l.holds {
		if h.conflicts(o) {
			before = append(before, o)
		}
	}
	l.holds = append(l.holds, h)
	l.mu.Unlock()
	if err := c.awaitHolds(ctx, before, deadline); err != nil {
		l.unlock(h)
		return nil, err
	}
	return h, nil
}

func (c *Client) awaitHolds(ctx context.Context, before []*blockHold, deadline time.Time) error {
	if len(before) == 0 {
		return nil
	}
	timeout := time.NewTimer(time.Until(deadline))
	defer timeout.Stop()
	for _, o := range before {
		select {
		case <-o.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timeout.C:
			return fmt.Errorf("nbd: %s: earlier writes to the same block have no answer within %v: %w", c.uri, c.opt.IOTimeout, memferry.ErrTimeout)
		case <-c.ctx.Done():
			return memferry.ErrClosed
		}
	}
	return nil
}

func (l *blockLocks) unlock(h *blockHold) {
	if h == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.holds, h)
	l.holds = slices.Delete(l.holds, i, i+1)
	close(h.done)
}

// write writes p at off.
func (c *Client) write(ctx context.Context, p []byte, off int64) error {
	deadline := time.Now().Add(c.opt.IOTimeout)
	hold, err := c.blocks.lock(ctx, c, off, int64(len(p)), deadline)
	if err != nil {
		return err
	}
	defer c.blocks.unlock(hold)
	if hold == nil || len(hold.partial) == 0 {
		return c.writeBlocks(ctx, [3][]byte{p}, off, time.Time{})
	}
	payload, err := c.complete(ctx, p, off, hold, deadline)
	if err != nil {
		return err
	}
	return c.writeBlocks(ctx, payload, hold.from, deadline)
}

// complete returns p with what else is in the blocks that it covers in part:
// the first one, those between, and the last one.
func (c *Client) complete(ctx context.Context, p []byte, off int64, hold *blockHold, deadline time.Time) ([3][]byte, error) {
	blocks := make([][]byte, len(hold.partial))
	err := parallel(int64(len(blocks)), func(i int64) error {
		b, at := make([]byte, c.align), uint64(hold.partial[i])
		blocks[i] = b
		return c.request(ctx, request{typ: cmdRead, offset: at, length: uint32(len(b))}, func(k *call) {
			k.dst, k.from, k.to, k.deadline = b, at, at+uint64(len(b)), deadline
		}, nil)
	})
	if err != nil {
		return [3][]byte{}, err
	}
	payload := [3][]byte{1: p}
	for i, at := range hold.partial {
		b := blocks[i]
		if at == hold.from {
			n := copy(b[max(off-at, 0):], p)
			payload[0], payload[1] = b, payload[1][n:]
			continue
		}
		middle := at - off // of p
		copy(b, p[middle:])
		payload[1], payload[2] = p[:middle], b
	}
	return payload, nil
}

// writeBlocks writes the parts of payload, one after the other, at off.
func (c *Client) writeBlocks(ctx context.Context, payload [3][]byte, off int64, deadline time.Time) error {
	var total int64
	for _, p := range payload {
		total += int64(len(p))
	}
	return split(off, total, c.maxRequest, func(at, n int64) error {
		part := cut(payload, at-off, n)
		err := c.request(ctx, request{typ: cmdWrite, offset: uint64(at), length: uint32(n)}, func(k *call) {
			k.payload, k.deadline = part, deadline
		}, nil)
		if err == nil {
			c.stats.writeBytes.Add(n)
		}
		return err
	})
}

// cut returns n bytes from off of what parts are, one after the other.
func cut(parts [3][]byte, off, n int64) (out [3][]byte) {
	for i, p := range parts {
		skip := min(off, int64(len(p)))
		p, off = p[skip:], off-skip
		k := min(n, int64(len(p)))
		out[i], n = p[:k], n-k
	}
	return out
}
