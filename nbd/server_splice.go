package nbd

import (
	"errors"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// spliceMin is the shortest read whose data goes by reference: below it,
	// copying costs less than the system calls that avoid it.
	spliceMin = 64 << 10
	// pipeSize is what a pipe should hold: as much as a process without
	// privileges may ask for (pipe(7), /proc/sys/fs/pipe-max-size).
	pipeSize = 1 << 20
	// maxPipes bounds the reads of a server that are sent by reference at the
	// same time. Further ones are copied.
	maxPipes = 16
	// pipeSlack is how many buffers of a pipe the data may take beyond whole
	// pages: one for the header, and one for data that starts inside a page.
	pipeSlack = 2
)

// pipe takes references to pages of a file, or of memory, to a socket
// (splice(2), vmsplice(2)), so that the server copies none of the data. All of
// a reply, the header included, is in the pipe before any of it is sent; what
// fails until then is answered with an error as any other read.
//
// The client gets what the pages hold when it takes the bytes from the socket,
// not when the server looked at them. That is within the time of the request,
// since the client has no reply until then.
//
// Over UNIX sockets that takes the server's share of the work away, and the
// client copies straight from the pages. Over TCP it does not pay: on the
// loopback device, small fragments cost as much as the copy (docs/benchmarks.md).
type pipe struct {
	r, w int
	room int // bytes, in whole pages
}

func newPipe() (*pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, err
	}
	p := &pipe{r: fds[0], w: fds[1]}
	// Refused to a user with many pipes; then it holds 64 KiB or less.
	_, _ = unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, pipeSize)
	room, err := unix.FcntlInt(uintptr(p.w), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		p.close()
		return nil, err
	}
	p.room = room
	return p, nil
}

// close can fail only for what is no descriptor.
func (p *pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// holds reports whether a header and n bytes of data are sure to fit.
func (p *pipe) holds(n int) bool {
	page := unix.Getpagesize()
	return (n+page-1)/page+pipeSlack <= p.room/page
}

// putHeader adds a copy of b.
func (p *pipe) putHeader(b []byte) error {
	return fill(len(b), func(done int) (int, error) { return unix.Write(p.w, b[done:]) })
}

// putFile adds n bytes of a file. It may wait for a disk.
func (p *pipe) putFile(fd int, off int64, n int) error {
	return fill(n, func(done int) (int, error) {
		k, err := unix.Splice(fd, &off, p.w, nil, n-done, unix.SPLICE_F_NONBLOCK)
		return int(k), err
	})
}

// putMemory adds b itself, which may be unmapped afterwards.
func (p *pipe) putMemory(b []byte) error {
	return fill(len(b), func(done int) (int, error) {
		v := unix.Iovec{Base: &b[done]}
		v.SetLen(len(b) - done)
		return unix.Vmsplice(p.w, []unix.Iovec{v}, unix.SPLICE_F_NONBLOCK)
	})
}

// errPipe is that a pipe took less than it should.
var errPipe = errors.New("pipe took less than it should")

// fill calls put, which returns how much it added, until it added n bytes.
func fill(n int, put func(done int) (int, error)) error {
	for done := 0; done < n; {
		k, err := put(done)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case k <= 0:
			return errPipe
		default:
			done += k
		}
	}
	return nil
}

// sendTo sends the n bytes in the pipe to a connection.
func (p *pipe) sendTo(nc net.Conn, raw syscall.RawConn, n int) error {
	var err error
	cerr := raw.Write(func(fd uintptr) bool {
		for n > 0 {
			var k int64
			k, err = unix.Splice(p.r, nil, int(fd), nil, n, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
			switch {
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.EAGAIN):
				return false
			case err != nil:
				return true
			default:
				n -= int(k)
			}
		}
		err = nil
		return true
	})
	switch {
	case cerr != nil:
		return cerr
	case errors.Is(err, unix.EINVAL): // a socket that takes no pages
		return p.copyTo(nc, n)
	}
	return err
}

// copyTo is sendTo by copying.
func (p *pipe) copyTo(nc net.Conn, n int) error {
	b := make([]byte, min(n, writePiece))
	for n > 0 {
		k, err := unix.Read(p.r, b[:min(n, len(b))])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if _, err := nc.Write(b[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// pipes are those of a server, at most maxPipes.
type pipes struct {
	mu     sync.Mutex
	inUse  int
	idle   []*pipe
	closed bool
}

// get returns an empty pipe for n bytes and a header, or nil where there is
// none to be had now.
func (s *pipes) get(n int) *pipe {
	s.mu.Lock()
	if s.inUse == maxPipes || s.closed {
		s.mu.Unlock()
		return nil
	}
	s.inUse++
	var p *pipe
	if last := len(s.idle) - 1; last >= 0 {
		p = s.idle[last]
		s.idle = s.idle[:last]
	}
	s.mu.Unlock()
	if p == nil {
		var err error
		if p, err = newPipe(); err != nil {
			s.ended()
			return nil
		}
	}
	if !p.holds(n) {
		s.put(p)
		return nil
	}
	return p
}

// put takes back a pipe that is empty again.
func (s *pipes) put(p *pipe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inUse--
	if s.closed {
		p.close()
		return
	}
	s.idle = append(s.idle, p)
}

// drop takes back a pipe that may hold something.
func (s *pipes) drop(p *pipe) {
	p.close()
	s.ended()
}

func (s *pipes) ended() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inUse--
}

// close closes the pipes that nobody uses; the others follow when put back.
func (s *pipes) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, p := range s.idle {
		p.close()
	}
	s.idle = nil
}

// readByReference serves READ without copying its data, or starts to. False
// means that it can't, and has done nothing.
func (c *serverConn) readByReference(rq request) (bool, error) {
	x := c.exp
	if rq.length < spliceMin || c.out.raw == nil || x.noSplice.Load() || x.caps.Viewer == nil && x.file == nil {
		return false, nil
	}
	p := c.srv.pipes.get(int(rq.length))
	if p == nil {
		return false, nil
	}
	if x.access != accessFile {
		done := c.readSpliced(rq, p)
		if !done {
			c.srv.pipes.ended()
		}
		return done, nil
	}
	err := c.start(func() { c.readDisk(rq, p) })
	if err != nil {
		c.srv.pipes.put(p)
	}
	return true, err
}

// readSpliced fills p, sends it, and puts it back. False means that it couldn't
// be filled: it is closed, nothing is sent, and reading in the usual way will
// say why.
func (c *serverConn) readSpliced(rq request, p *pipe) bool {
	n, err := c.fillPipe(p, rq)
	if err != nil {
		if errors.Is(err, unix.EINVAL) { // as of a file system without splice
			c.exp.noSplice.Store(true)
		}
		p.close()
		return false
	}
	c.counters.readBytes.Add(int64(rq.length))
	c.counters.splicedBytes.Add(int64(rq.length))
	if c.out.sendPipe(p, n) {
		c.srv.pipes.put(p)
	} else {
		c.srv.pipes.drop(p)
	}
	return true
}

// readDisk serves READ of a file that may have to wait for its disk; it holds
// a slot.
func (c *serverConn) readDisk(rq request, p *pipe) {
	if c.readSpliced(rq, p) {
		c.released(held{slot: true})
		return
	}
	// Whoever has memory may be waiting for a slot, so this one must not wait
	// for memory with a slot. It stays counted as one with a pipe instead.
	defer c.srv.pipes.ended()
	c.released(held{slot: true})
	defer c.out.flush()
	buf, err := c.buffer(int(rq.length))
	if err != nil {
		c.replyFailure(rq, err, held{})
		return
	}
	c.readInto(rq, buf, held{})
}

// fillPipe puts a whole reply into p and returns its length.
func (c *serverConn) fillPipe(p *pipe, rq request) (int, error) {
	var space [64]byte
	header := c.appendDataHeader(space[:0], rq)
	if err := p.putHeader(header); err != nil {
		return 0, err
	}
	return len(header) + int(rq.length), c.fillData(p, rq)
}

func (c *serverConn) fillData(p *pipe, rq request) error {
	x, off, n := c.exp, int64(rq.offset), int(rq.length)
	if v := x.caps.Viewer; x.file == nil {
		b, err := v.View(off, int64(n))
		if err != nil {
			return err
		}
		defer v.ReleaseView()
		return p.putMemory(b)
	}
	var err error
	if cerr := x.file.Control(func(fd uintptr) { err = p.putFile(int(fd), off, n) }); cerr != nil {
		return cerr
	}
	return err
}
