package netsim

import (
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxBatch bounds what one writev takes, so that a stalled receiver does
	// not hold much more buffer memory than it has to.
	maxBatch = 4 << 20
	// maxSegments bounds the vector of one writev: UIO_MAXIOV, writev(2).
	maxSegments = 1024
	// paceInterval is how much of a bounded link's time one read may take.
	paceInterval = 2 * time.Millisecond
	// minPiece is the least a read takes on a bounded link: one segment.
	minPiece = 1460
)

// direction is what all streams of one direction share: the wire's time, and
// the memory of the bytes under way.
type direction struct {
	p         *Proxy
	delivered atomic.Int64

	mu   sync.Mutex // guards what follows
	room sync.Cond  // of mu: bytes have been delivered, or something changed
	used int64      // bytes under way
	free time.Time  // when the wire has sent all that it accepted
}

func (d *direction) init(p *Proxy) {
	d.p = p
	d.room.L = &d.mu
}

// changed is called after the link was.
func (d *direction) changed() {
	d.mu.Lock()
	d.free = time.Time{}
	d.mu.Unlock()
	d.room.Broadcast()
}

// send accounts for n bytes that arrived now and returns when they are due at
// the far end.
func (d *direction) send(link *Link, n int) time.Time {
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.used += int64(n)
	if link.Bandwidth > 0 {
		if now.Before(d.free) {
			now = d.free
		}
		now = now.Add(time.Duration(float64(n) / float64(link.Bandwidth) * float64(time.Second)))
		d.free = now
	}
	return now.Add(link.oneWay())
}

func (d *direction) deliver(n int) {
	d.delivered.Add(int64(n))
	d.forget(n)
}

// forget gives back the room of n bytes.
func (d *direction) forget(n int) {
	d.mu.Lock()
	d.used -= int64(n)
	d.mu.Unlock()
	d.room.Broadcast()
}

// segment is a run of bytes under way, or the end of the stream.
type segment struct {
	due      time.Time
	b        *block
	off, end int
	last     error // instead of bytes: io.EOF, or that the sender was reset
}

// stream is one direction of a connection. One goroutine reads and one writes.
type stream struct {
	c     *conn
	d     *direction
	timer *timer        // the writer's sleep
	late  lateness      // of that sleep
	ready chan struct{} // cap 1: the queue is no longer empty, or a kick
	nudge chan struct{} // cap 1: the same for a reader that paces itself
	kicks atomic.Uint64 // how often kick was called

	mu      sync.Mutex // guards what follows
	queue   []segment  // in order of due
	head    int        // of queue
	used    int64      // bytes in queue or being written
	lastDue time.Time
}

func newStream(c *conn, d *direction) (*stream, error) {
	t, err := newTimer()
	if err != nil {
		return nil, err
	}
	return &stream{c: c, d: d, timer: t, ready: make(chan struct{}, 1), nudge: make(chan struct{}, 1)}, nil
}

// signal makes a channel of capacity one readable.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// kick makes both goroutines look at the state of conn and proxy again, except
// where they are in a system call on a socket.
func (s *stream) kick() {
	s.kicks.Add(1)
	signal(s.ready)
	signal(s.nudge)
	s.timer.wake()
	s.d.mu.Lock()   // a waiter between its look and its Wait holds the lock
	s.d.mu.Unlock() //nolint:staticcheck // see above
	s.d.room.Broadcast()
}

// stopped tells that nothing will be carried any more.
func (s *stream) stopped() bool {
	return s.c.frozen.Load() || s.c.ended()
}

// read moves bytes from src to the queue until its end.
func (s *stream) read(src net.Conn) {
	var b *block
	var off int
	for {
		link := s.admit()
		if link == nil {
			break
		}
		if b == nil || blockSize-off < minRead {
			if b != nil {
				s.c.p.blocks.release(b)
			}
			b, off = s.c.p.blocks.get(), 0
		}
		n, err := src.Read(b.mem[off:min(blockSize, off+link.piece())])
		if s.stopped() {
			break
		}
		if n > 0 {
			b.refs.Add(1)
			s.push(segment{due: s.d.send(s.c.p.link.Load(), n), b: b, off: off, end: off + n})
			off += n
		}
		if err != nil {
			s.push(segment{due: time.Now().Add(s.c.p.link.Load().oneWay()), last: err})
			break
		}
	}
	if b != nil {
		s.c.p.blocks.release(b)
	}
}

// piece is how much one read may take.
func (l *Link) piece() int {
	if l.Bandwidth == 0 {
		return blockSize
	}
	n := float64(l.Bandwidth) * paceInterval.Seconds()
	return int(min(max(n, minPiece), blockSize))
}

// admit waits until the link takes more bytes, and returns the link, or nil
// where it never will.
func (s *stream) admit() *Link {
	for {
		if s.stopped() {
			return nil
		}
		link := s.c.p.link.Load()
		wait := s.room(link)
		if wait <= 0 {
			return link
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-s.nudge:
		}
		t.Stop()
	}
}

// room waits while too much is under way, and then returns how long the wire
// is taken beyond its queue. It returns early, with a positive time, after a
// kick.
func (s *stream) room(link *Link) time.Duration {
	kicks := s.kicks.Load()
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	for {
		if s.kicks.Load() != kicks || s.stopped() {
			return time.Nanosecond
		}
		s.mu.Lock()
		mine := s.used
		s.mu.Unlock()
		if !s.c.p.hole.Load() && s.d.used < link.Buffer && mine < link.Buffer/connShare {
			break
		}
		s.d.room.Wait()
	}
	if link.Bandwidth == 0 || s.d.free.IsZero() {
		return 0
	}
	return time.Until(s.d.free) - link.Queue
}

// push appends to the queue. Jitter and changes of the link never reorder it.
func (s *stream) push(seg segment) {
	s.mu.Lock()
	if seg.due.Before(s.lastDue) {
		seg.due = s.lastDue
	}
	s.lastDue = seg.due
	s.used += int64(seg.end - seg.off)
	empty := s.head == len(s.queue)
	s.queue = append(s.queue, seg)
	s.mu.Unlock()
	if empty {
		signal(s.ready)
	}
}

// write moves bytes from the queue to dst as they become due, until the end of
// the stream.
func (s *stream) write(dst net.Conn) {
	var batch []segment
	var vec net.Buffers
	for {
		batch = s.take(batch[:0])
		if len(batch) == 0 {
			return
		}
		if last := batch[0].last; last != nil {
			s.finish(dst, last)
			return
		}
		vec = vec[:0]
		n := 0
		for i, seg := range batch {
			n += seg.end - seg.off
			if i > 0 && batch[i-1].b == seg.b && batch[i-1].end == seg.off {
				prev := &vec[len(vec)-1]
				*prev = (*prev)[:len(*prev)+seg.end-seg.off]
				continue
			}
			vec = append(vec, seg.b.mem[seg.off:seg.end:blockSize])
		}
		v := vec
		_, err := v.WriteTo(dst)
		s.settle(batch, n)
		if err != nil {
			s.d.forget(n)
			s.c.broken()
			return
		}
		s.d.deliver(n)
	}
}

// settle gives back the memory of segments, n bytes in all. The room in the
// direction is given back by the caller.
func (s *stream) settle(batch []segment, n int) {
	for _, seg := range batch {
		s.c.p.blocks.release(seg.b)
	}
	s.mu.Lock()
	s.used -= int64(n)
	s.mu.Unlock()
}

// discard empties the queue of a stream that has ended.
func (s *stream) discard() {
	s.mu.Lock()
	rest := s.queue[s.head:]
	s.queue, s.head = nil, 0
	s.mu.Unlock()
	n := 0
	for _, seg := range rest {
		if seg.b != nil {
			s.c.p.blocks.release(seg.b)
		}
		n += seg.end - seg.off
	}
	s.d.forget(n)
}

// finish passes the end of the stream on.
func (s *stream) finish(dst net.Conn, last error) {
	half, ok := dst.(interface{ CloseWrite() error })
	if errors.Is(last, io.EOF) && ok && half.CloseWrite() == nil {
		return
	}
	s.c.broken()
}

// take waits until something is due and appends all that is to batch. The end
// of the stream comes alone; nothing means that it was cut off.
func (s *stream) take(batch []segment) []segment {
	for {
		kicks := s.kicks.Load()
		if s.stopped() {
			return nil
		}
		if s.c.p.hole.Load() {
			<-s.ready
			continue
		}
		var wait time.Duration
		if batch, wait = s.due(batch); len(batch) > 0 {
			return batch
		}
		if wait == 0 {
			<-s.ready
			continue
		}
		s.pause(wait, kicks)
	}
}

// pause sleeps for a time, or until a kick after the given one. It aims a
// little early, and spins away what is left: sleeps end late.
func (s *stream) pause(wait time.Duration, kicks uint64) {
	end := time.Now().Add(wait)
	if nap := wait - s.late.usual(); nap > 0 {
		s.timer.arm(nap)
		if s.kicks.Load() != kicks { // the arming may have undone its wake
			return
		}
		s.timer.sleep()
		if s.kicks.Load() == kicks {
			s.late.note(time.Since(end) + wait - nap)
		}
	}
	for s.kicks.Load() == kicks && time.Until(end) > 0 && time.Until(end) <= maxLateness {
		runtime.Gosched() // whoever has something to do goes first
	}
}

// due takes what is due, or tells how long until something is; zero means that
// there is nothing.
func (s *stream) due(batch []segment) ([]segment, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.head == len(s.queue) {
		return batch, 0
	}
	now := time.Now()
	if wait := s.queue[s.head].due.Sub(now); wait > 0 {
		return batch, wait
	}
	for n := 0; s.head < len(s.queue) && n < maxBatch && len(batch) < maxSegments; s.head++ {
		seg := s.queue[s.head]
		if seg.due.After(now) || seg.last != nil && len(batch) > 0 {
			break
		}
		batch = append(batch, seg)
		n += seg.end - seg.off
		s.queue[s.head] = segment{}
		if seg.last != nil {
			s.head++
			break
		}
	}
	s.compact()
	return batch, 0
}

// compact drops the consumed head of the queue once it is the larger part.
func (s *stream) compact() {
	if s.head*2 < len(s.queue) {
		return
	}
	n := copy(s.queue, s.queue[s.head:])
	clear(s.queue[n:])
	s.queue, s.head = s.queue[:n], 0
}
