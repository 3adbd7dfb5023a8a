package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// streamBufferSize holds what one read of a socket takes in of requests:
	// nearly six hundred headers.
	streamBufferSize = 16 << 10
	// bulkTail is how much is read past a large payload, or at the place of a
	// header when large payloads are expected: little, since whatever of a
	// payload lands in the stream's buffer has to be copied out of it.
	bulkTail = 2 << 10
	// bulkPayload is a payload's length from which on it is large.
	bulkPayload = 32 << 10
)

// errWouldBlock is returned by a read that was not to wait.
var errWouldBlock = errors.New("nothing to read now")

// stream reads from a connection: headers through a buffer, so that many come
// with one system call, and payloads past it, straight to where they belong.
// Use by one goroutine.
type stream struct {
	nc   net.Conn
	raw  syscall.RawConn // nil where nc has no descriptor
	buf  []byte          // buf[r:w] is read and not yet taken
	r, w int
	bulk bool // the last payload was large

	// Arguments and results of one system call, here so that the callback that
	// RawConn wants is made once.
	callback func(fd uintptr) bool
	one      []byte
	vec      [][]byte
	wait     bool
	n        int
	err      error

	// patience is for a message that has begun, to go on.
	patience patience
}

func newStream(nc net.Conn, timeout time.Duration) *stream {
	s := &stream{nc: nc, buf: make([]byte, streamBufferSize), patience: patience{timeout: timeout, set: nc.SetReadDeadline}}
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			s.raw = raw
			s.callback = s.read
		}
	}
	return s
}

// read is the callback of RawConn: one read, or one vectored read, of fd.
func (s *stream) read(fd uintptr) bool {
	for {
		if len(s.vec) > 0 {
			s.n, s.err = unix.Readv(int(fd), s.vec)
		} else {
			// Of package syscall, which tells the race detector.
			s.n, s.err = syscall.Read(int(fd), s.one)
		}
		if s.err == nil {
			return true
		}
		if errors.Is(s.err, unix.EINTR) {
			continue
		}
		if !errors.Is(s.err, unix.EAGAIN) {
			return true
		}
		if s.wait {
			return false
		}
		s.n, s.err = 0, errWouldBlock
		return true
	}
}

// receive reads once into p, and what follows into tail. It returns how much
// arrived, one byte or more where the error is nil. With wait unset it returns
// errWouldBlock instead of waiting, as far as the connection allows that.
func (s *stream) receive(p, tail []byte, wait bool) (int, error) {
	if s.raw == nil {
		if !wait {
			return 0, errWouldBlock
		}
		return s.nc.Read(p)
	}
	s.one, s.wait = p, wait
	if len(tail) > 0 {
		s.vec = append(s.vec[:0], p, tail)
	}
	err := s.raw.Read(s.callback)
	s.one = nil
	clear(s.vec)
	s.vec = s.vec[:0]
	switch {
	case err != nil:
		return 0, err
	case s.err != nil:
		return 0, s.err
	case s.n <= 0:
		return 0, io.EOF
	}
	return s.n, nil
}

// buffered returns how many bytes are read and not yet taken.
func (s *stream) buffered() int { return s.w - s.r }

// fill waits for bytes and adds them to the buffer. There must be room: ask
// for no more than streamBufferSize at once.
func (s *stream) fill() error {
	n, err := s.receive(s.space(), nil, true)
	s.w += n
	return err
}

// space returns where in the buffer to read to next.
func (s *stream) space() []byte {
	if s.r > 0 {
		s.w = copy(s.buf, s.buf[s.r:s.w])
		s.r = 0
	}
	p := s.buf[s.w:]
	if s.bulk && len(p) > bulkTail {
		p = p[:bulkTail]
	}
	return p
}

// take returns the next n bytes, which must be buffered; valid until the next
// fill.
func (s *stream) take(n int) []byte {
	p := s.buf[s.r : s.r+n]
	s.r += n
	return p
}

// need waits until n bytes are buffered. Each step must come within its patience.
func (s *stream) need(n int) error {
	for s.buffered() < n {
		s.patience.arm()
		if err := s.fill(); err != nil {
			return midMessage(err)
		}
	}
	return nil
}

// full reads all of p. Before it waits for the network it calls beforeWait.
func (s *stream) full(p []byte, beforeWait func()) error {
	s.bulk = len(p) >= bulkPayload
	n := copy(p, s.buf[s.r:s.w])
	s.r += n
	p = p[n:]
	for len(p) > 0 {
		// The buffer is empty here.
		s.r, s.w = 0, 0
		tail := s.buf
		if s.bulk {
			tail = tail[:bulkTail]
		}
		n, err := s.receive(p, tail, false)
		if errors.Is(err, errWouldBlock) {
			beforeWait()
			s.patience.begin()
			n, err = s.receive(p, tail, true)
			s.patience.end()
		}
		if err != nil {
			return midMessage(err)
		}
		s.w = max(0, n-len(p))
		p = p[min(n, len(p)):]
	}
	return nil
}

// discard takes n bytes and drops them.
func (s *stream) discard(n int64) error {
	for n > 0 {
		if s.buffered() == 0 {
			s.patience.arm()
			if err := s.fill(); err != nil {
				return midMessage(err)
			}
		}
		k := min(n, int64(s.buffered()))
		s.r += int(k)
		n -= k
	}
	return nil
}

// midMessage turns the end of the connection into an error, since a message
// was not complete.
func midMessage(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
