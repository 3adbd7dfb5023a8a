package nbd

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/zero"
)

const (
	// inlineZero is how much is zeroed or trimmed in memory without handing it
	// to another goroutine.
	inlineZero = 1 << 20
	// holeTry is the shortest read for which holes are looked for, and
	// holeInterval how often while none are found.
	holeTry      = 32 << 10
	holeInterval = 16
	// statusExtents bounds the extents of one block status.
	statusExtents = 4 * memferry.MaxExtents
	// zeroPiece is how much is zeroed at a time for a backend that can't.
	zeroPiece = 256 << 10
	// throughPiece is how much of a payload is passed on at a time to a file in
	// memory: little enough to still be in the processor's cache.
	throughPiece = 64 << 10
)

func isNoSpace(err error) bool {
	return errors.Is(err, memferry.ErrNoSpace) || errors.Is(err, syscall.ENOSPC) ||
		errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}

// errnoOfSystem maps the errors of system calls.
func errnoOfSystem(err error) Errno {
	switch {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EROFS):
		return EPERM
	case errors.Is(err, syscall.ENOMEM):
		return ENOMEM
	case errors.Is(err, syscall.EINVAL):
		return EINVAL
	}
	return EIO
}

// dispatch serves a valid request, or starts to. An error ends the connection.
func (c *serverConn) dispatch(rq request) error {
	switch rq.typ {
	case cmdRead:
		return c.read(rq)
	case cmdWrite:
		return c.write(rq)
	case cmdBlockStatus:
		return c.start(func() { c.blockStatus(rq) })
	case cmdTrim, cmdWriteZeroes:
		if c.exp.caps.Viewer != nil && rq.length <= inlineZero && rq.flags&cmdFlagFUA == 0 {
			c.reply(rq, c.execute(rq), held{})
			return nil
		}
	}
	return c.start(func() { c.reply(rq, c.execute(rq), held{slot: true}) })
}

// reply answers a request that has no data.
func (c *serverConn) reply(rq request, err error, h held) {
	if err != nil {
		c.replyFailure(rq, err, h)
		return
	}
	c.replyDone(rq, h)
}

// execute performs a command without payload or data.
func (c *serverConn) execute(rq request) error {
	x, off, n := c.exp, int64(rq.offset), int64(rq.length)
	if rq.typ == cmdFlush {
		return x.syncs.do()
	}
	if n == 0 {
		return nil
	}
	switch rq.typ {
	case cmdTrim:
		if err := x.caps.Trimmer.Trim(off, n); err != nil {
			return err
		}
	case cmdCache:
		return x.cache(off, n)
	case cmdWriteZeroes:
		if err := c.writeZeroes(rq); err != nil {
			return err
		}
	}
	return c.syncIfFUA(rq)
}

func (c *serverConn) syncIfFUA(rq request) error {
	if rq.flags&cmdFlagFUA == 0 {
		return nil
	}
	return c.exp.syncs.do()
}

func (c *serverConn) writeZeroes(rq request) error {
	var flags memferry.ZeroFlags
	if rq.flags&cmdFlagNoHole != 0 {
		flags |= memferry.ZeroNoHole
	}
	if rq.flags&cmdFlagFastZero != 0 {
		flags |= memferry.ZeroFast
	}
	off, n := int64(rq.offset), int64(rq.length)
	err := c.exp.caps.ZeroWriter.WriteZeroes(off, n, flags)
	if flags&memferry.ZeroFast == 0 && errors.Is(err, memferry.ErrNotSupported) {
		// WRITE_ZEROES without FAST_ZERO must not fail for being slow.
		return zero.Write(off, n, zeroPiece, func(p []byte, off int64) error {
			return c.exp.writeAt(c.srv.ctx, p, off)
		})
	}
	return err
}

// read serves READ. The data, all of it, is there before the reply begins, so
// an error is always an error reply and nothing else.
func (c *serverConn) read(rq request) error {
	x, off := c.exp, int64(rq.offset)
	if rq.length == 0 {
		c.replyDone(rq, held{})
		return nil
	}
	if c.readsHole(rq) {
		c.replyHole(rq, held{})
		return nil
	}
	if done, err := c.readByReference(rq); done || err != nil {
		return err
	}
	if v := x.caps.Viewer; v != nil {
		p, err := v.View(off, int64(rq.length))
		if err != nil {
			c.replyFailure(rq, err, held{})
			return nil
		}
		c.replyData(rq, p, held{viewer: v})
		return nil
	}
	buf, err := c.buffer(int(rq.length))
	if err != nil {
		return c.noBuffer(rq, err)
	}
	switch {
	case x.access == accessMemory:
		c.readInto(rq, buf, held{})
		return nil
	case x.access == accessFile && x.readCached(buf.b, off):
		c.replyData(rq, buf.b, held{buf: buf})
		return nil
	}
	if err := c.start(func() { c.readInto(rq, buf, held{slot: true}) }); err != nil {
		c.giveBack(buf)
		return err
	}
	return nil
}

// noBuffer handles the failure to get memory: the end of the connection, or of
// the host's memory.
func (c *serverConn) noBuffer(rq request, err error) error {
	if c.ctx.Err() != nil {
		return err
	}
	c.replyFailure(rq, err, held{})
	return nil
}

// readInto reads into buf and replies.
func (c *serverConn) readInto(rq request, buf *buffer, h held) {
	h.buf = buf
	if err := c.exp.readAt(c.ctx, buf.b, int64(rq.offset)); err != nil {
		c.replyFailure(rq, err, h)
		return
	}
	c.replyData(rq, buf.b, h)
}

// readsHole reports whether the range is known, at little cost, to read as
// zero, so that a few bytes can stand for it. Where the reads of a file have
// found no holes, it looks only now and then; memory tells at no cost.
func (c *serverConn) readsHole(rq request) bool {
	if !c.structured || rq.length < holeTry || rq.flags&cmdFlagDF != 0 {
		return false
	}
	c.reads++
	if c.exp.file != nil && !c.holes && c.reads%holeInterval != 1 {
		return false
	}
	c.holes = c.exp.hole(c.ctx, int64(rq.offset), int64(rq.length))
	return c.holes
}

// write serves WRITE, whose payload follows.
func (c *serverConn) write(rq request) error {
	c.counters.writeBytes.Add(int64(rq.length))
	switch {
	case rq.length == 0:
		c.replyDone(rq, held{})
		return nil
	case c.exp.caps.Viewer != nil:
		return c.writeView(rq)
	case rq.length > throughPiece && c.exp.access == accessMemory && c.writesInline(rq):
		return c.writeThrough(rq)
	case int64(rq.length) > c.writePieceSize():
		return c.writePieces(rq)
	}
	return c.writeBuffer(rq)
}

// writeView receives the payload where it belongs.
func (c *serverConn) writeView(rq request) error {
	v := c.exp.caps.Viewer
	p, err := v.ViewForWrite(int64(rq.offset), int64(rq.length))
	if err != nil {
		c.replyFailure(rq, err, held{})
		return c.discard(int64(rq.length))
	}
	err = c.in.full(p, c.out.flush)
	v.ReleaseView()
	if err != nil {
		return err
	}
	if rq.flags&cmdFlagFUA == 0 {
		c.replyDone(rq, held{})
		return nil
	}
	return c.start(func() { c.reply(rq, c.syncIfFUA(rq), held{slot: true}) })
}

// receive returns a buffer with the next n bytes of a payload.
func (c *serverConn) receive(n int) (*buffer, error) {
	buf, err := c.buffer(n)
	if err != nil {
		return nil, err
	}
	if err := c.in.full(buf.b, c.out.flush); err != nil {
		c.giveBack(buf)
		return nil, err
	}
	return buf, nil
}

func (c *serverConn) writeBuffer(rq request) error {
	buf, err := c.receive(int(rq.length))
	if err != nil {
		return err
	}
	if c.writesInline(rq) {
		err := c.exp.writeAt(c.srv.ctx, buf.b, int64(rq.offset))
		c.reply(rq, err, held{buf: buf})
		return nil
	}
	err = c.start(func() {
		err := c.exp.writeAt(c.srv.ctx, buf.b, int64(rq.offset))
		if err == nil {
			err = c.syncIfFUA(rq)
		}
		c.reply(rq, err, held{buf: buf, slot: true})
	})
	if err != nil {
		c.giveBack(buf)
	}
	return err
}

// writeThrough passes the payload on in pieces, through one piece of memory. It
// is for writes that don't block.
func (c *serverConn) writeThrough(rq request) error {
	buf, err := c.buffer(throughPiece)
	if err != nil {
		return err
	}
	var failed error // the payload has to be taken all the same
	for off, end := int64(rq.offset), int64(rq.offset)+int64(rq.length); off < end; {
		p := buf.b[:min(throughPiece, end-off)]
		if err := c.in.full(p, c.out.flush); err != nil {
			c.giveBack(buf)
			return err
		}
		if failed == nil {
			failed = c.exp.writeAt(c.srv.ctx, p, off)
		}
		off += int64(len(p))
	}
	c.reply(rq, failed, held{buf: buf})
	return nil
}

// writesInline reports whether the reading goroutine may write.
func (c *serverConn) writesInline(rq request) bool {
	if rq.flags&cmdFlagFUA != 0 {
		return false
	}
	switch c.exp.access {
	case accessMemory:
		return true
	case accessFile:
		return c.alone()
	}
	return false
}

// writePieceSize is the length from which on a payload is passed on in
// pieces: so a client that stalls in the middle of it holds the memory of one
// piece. A backend that prefers larger blocks gets them whole.
func (c *serverConn) writePieceSize() int64 {
	return int64(max(c.exp.sizes.preferred, 1<<maxClassShift))
}

// pieceGroup collects the pieces of one write.
type pieceGroup struct {
	left atomic.Int64 // pieces, and one for the reading goroutine
	mu   sync.Mutex
	err  error // the first
}

func (g *pieceGroup) note(err error) {
	if err == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil {
		g.err = err
	}
}

// writePieces passes the payload on in pieces, which end where the backend's
// blocks do. The last to be done replies.
func (c *serverConn) writePieces(rq request) error {
	g := &pieceGroup{}
	g.left.Store(1)
	size := c.writePieceSize()
	off, end := int64(rq.offset), int64(rq.offset)+int64(rq.length)
	for off < end {
		next := min((off/size+1)*size, end)
		if err := c.startPiece(rq, g, off, int(next-off)); err != nil {
			return err
		}
		off = next
	}
	// The reply takes a slot of its own, since it may have to wait for a Sync.
	return c.start(func() { c.endPiece(rq, g) })
}

func (c *serverConn) startPiece(rq request, g *pieceGroup, off int64, n int) error {
	buf, err := c.receive(n)
	if err != nil {
		return err
	}
	g.left.Add(1)
	err = c.start(func() {
		g.note(c.exp.writeAt(c.srv.ctx, buf.b, off))
		c.released(held{buf: buf})
		c.endPiece(rq, g)
	})
	if err != nil {
		c.giveBack(buf)
	}
	return err
}

// endPiece is called for each piece and for the reading goroutine. The last
// call replies, and its slot is held until that is sent.
func (c *serverConn) endPiece(rq request, g *pieceGroup) {
	if g.left.Add(-1) > 0 {
		c.released(held{slot: true})
		return
	}
	err := g.err
	if err == nil {
		err = c.syncIfFUA(rq)
	}
	c.reply(rq, err, held{slot: true})
}

// blockStatus answers BLOCK_STATUS: one chunk per selected context.
func (c *serverConn) blockStatus(rq request) {
	h := held{slot: true}
	extents, err := c.allocation(rq)
	if err != nil {
		c.replyFailure(rq, err, h)
		return
	}
	b := c.out.begin()
	for i, m := range c.contexts {
		e := []statusExtent{{length: rq.length}}
		if m.kind == metaAllocation {
			e = extents
		}
		flags := uint16(0)
		if i == len(c.contexts)-1 {
			flags = replyFlagDone
		}
		b.arena = appendBlockStatus(b.arena, flags, rq.cookie, uint32(i)+1, e)
	}
	c.out.commit(h, true)
}

// allocation returns the extents of base:allocation if that was selected.
func (c *serverConn) allocation(rq request) ([]statusExtent, error) {
	selected := false
	for _, m := range c.contexts {
		selected = selected || m.kind == metaAllocation
	}
	if !selected {
		return nil, nil
	}
	limit := statusExtents
	if rq.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	return statusOf(c.ctx, c.exp.caps.Extenter, int64(rq.offset), int64(rq.length), limit)
}

// statusOf returns at most limit extents of [off, off+n), from its start,
// neighbours of one status joined.
func statusOf(ctx context.Context, x memferry.Extenter, off, n int64, limit int) ([]statusExtent, error) {
	var all []statusExtent
	for end := off + n; off < end; {
		extents, err := x.Extents(ctx, off, end-off)
		if err != nil {
			return nil, err
		}
		start := off
		for _, e := range extents {
			if e.Off != off || e.Len <= 0 || e.Len > end-off {
				return nil, errors.New("backend gave extents out of order or range")
			}
			s := statusExtent{length: uint32(e.Len), status: statusFlags(e.Flags)}
			if k := len(all) - 1; k >= 0 && all[k].status == s.status {
				all[k].length += s.length
			} else if len(all) == limit {
				return all, nil
			} else {
				all = append(all, s)
			}
			off += e.Len
		}
		if off == start {
			return nil, errors.New("backend gave no extents")
		}
	}
	return all, nil
}

func statusFlags(f memferry.ExtentFlags) uint32 {
	var s uint32
	if f&memferry.ExtentHole != 0 {
		s |= stateHole
	}
	if f&memferry.ExtentZero != 0 {
		s |= stateZero
	}
	return s
}
