package nbd

import (
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/memferry/memferry"
)

const (
	// batchBytes and batchVectors are how much is gathered into one system
	// call before the reader of requests stops to send it.
	batchBytes   = 512 << 10
	batchVectors = 256
	// batchArena is room for the headers of a batch.
	batchArena = 4 << 10
	// writePiece is the most that is sent under one write timeout.
	writePiece = 1 << 20
)

// held is what a reply keeps until it is sent.
type held struct {
	buf    *buffer         // back to the pool
	viewer memferry.Viewer // whose view ends
	slot   bool            // one request in flight less
}

// batch is a run of replies on their way into one system call: headers in the
// arena, data where it is.
type batch struct {
	arena []byte
	start int // the arena from here on is in no vector yet
	vecs  [][]byte
	bytes int
	held  []held
}

func (b *batch) empty() bool { return len(b.vecs) == 0 && b.start == len(b.arena) }

func (b *batch) full() bool {
	return b.bytes >= batchBytes || len(b.vecs) >= batchVectors || len(b.arena) >= batchArena
}

// seal ends the current run of headers.
func (b *batch) seal() {
	if b.start < len(b.arena) {
		b.vecs = append(b.vecs, b.arena[b.start:])
		b.start = len(b.arena)
	}
}

// addData puts data after the headers so far; the caller holds it until sent.
func (b *batch) addData(p []byte) {
	if len(p) == 0 {
		return
	}
	b.seal()
	b.vecs = append(b.vecs, p)
	b.bytes += len(p)
}

func (b *batch) reset() {
	if cap(b.arena) > 4*batchArena {
		b.arena = make([]byte, 0, batchArena)
	}
	clear(b.vecs)
	clear(b.held)
	b.arena, b.start, b.vecs, b.bytes, b.held = b.arena[:0], 0, b.vecs[:0], 0, b.held[:0]
}

// replies sends the replies of one connection. Whoever has one adds it to the
// batch; whoever flushes while nobody is sending sends it all, and whatever is
// added meanwhile. So replies are gathered as soon as the socket is the
// bottleneck, and go out at once when it is not.
type replies struct {
	nc      net.Conn
	raw     syscall.RawConn // of a UNIX socket, which takes pages; else nil
	release func(held)

	mu      sync.Mutex
	room    sync.Cond
	pending *batch
	spare   *batch
	sending bool
	err     error // the first; everything after it is dropped

	// Of the one that sends.
	patience patience // for writePiece bytes
	out      net.Buffers
}

func newReplies(nc net.Conn, timeout time.Duration, release func(held)) *replies {
	w := &replies{nc: nc, release: release, patience: patience{timeout: timeout, set: nc.SetWriteDeadline}}
	w.room.L = &w.mu
	if u, ok := nc.(*net.UnixConn); ok {
		// Without it, nothing is sent by reference.
		w.raw, _ = u.SyscallConn()
	}
	w.pending = &batch{arena: make([]byte, 0, batchArena)}
	w.spare = &batch{arena: make([]byte, 0, batchArena)}
	return w
}

// begin locks the batch for adding a reply; commit ends it. What is added to
// the arena between them stays together with the data that follows it.
func (w *replies) begin() *batch {
	w.mu.Lock()
	return w.pending
}

// commit notes what the reply holds, and with send makes sure that it leaves.
func (w *replies) commit(h held, send bool) {
	if h != (held{}) {
		w.pending.held = append(w.pending.held, h)
	}
	if send {
		w.sendLocked()
	}
	w.mu.Unlock()
}

// flush makes sure that all replies added before leave, by this goroutine or
// the one that is sending now.
func (w *replies) flush() {
	w.mu.Lock()
	w.sendLocked()
	w.mu.Unlock()
}

// makeRoom sends, or waits for whoever does, until the batch is not full.
func (w *replies) makeRoom() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && w.pending.full() {
		if w.sending {
			w.room.Wait()
		} else {
			w.sendLocked()
		}
	}
	return w.err
}

// drain waits until everything is sent or dropped.
func (w *replies) drain() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		w.sendLocked()
		if !w.sending {
			return
		}
		w.room.Wait()
	}
}

// sendPipe sends what is pending and then the n bytes in p, for which it waits
// for its turn. It reports whether p is empty; otherwise the connection is at
// its end.
func (w *replies) sendPipe(p *pipe, n int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.sending {
		w.room.Wait()
	}
	w.sendLocked()
	if w.err != nil {
		return false
	}
	w.sending = true
	w.mu.Unlock()
	w.patience.begin()
	err := p.sendTo(w.nc, w.raw, n)
	w.patience.end()
	w.mu.Lock()
	w.sending = false
	w.failLocked(err)
	w.sendLocked() // what was added meanwhile
	w.room.Broadcast()
	return err == nil
}

// failLocked notes an error of the connection and ends it.
func (w *replies) failLocked(err error) {
	if err == nil || w.err != nil {
		return
	}
	w.err = err
	// Wakes the reader, which ends the connection.
	_ = w.nc.Close()
}

// sendLocked sends until nothing is pending, unless another goroutine does. It
// releases the mutex while it writes.
func (w *replies) sendLocked() {
	if w.sending {
		return
	}
	w.sending = true
	for !w.pending.empty() || len(w.pending.held) > 0 {
		b := w.pending
		w.pending, w.spare = w.spare, nil
		err := w.err
		w.mu.Unlock()
		if err == nil {
			err = w.write(b)
		}
		for _, h := range b.held {
			w.release(h)
		}
		b.reset()
		w.mu.Lock()
		w.spare = b
		w.failLocked(err)
		w.room.Broadcast()
	}
	w.sending = false
	w.room.Broadcast()
}

// write sends b, in pieces of which each has the whole timeout.
func (w *replies) write(b *batch) error {
	b.seal()
	if len(b.arena)+b.bytes <= writePiece {
		return w.writeVectors(b.vecs)
	}
	var piece [][]byte
	size := 0
	for _, v := range b.vecs {
		for len(v) > 0 {
			n := min(len(v), writePiece-size)
			piece = append(piece, v[:n])
			size += n
			v = v[n:]
			if size < writePiece {
				continue
			}
			if err := w.writeVectors(piece); err != nil {
				return err
			}
			piece, size = piece[:0], 0
		}
	}
	return w.writeVectors(piece)
}

func (w *replies) writeVectors(v [][]byte) error {
	w.patience.begin()
	defer w.patience.end()
	if len(v) == 1 {
		_, err := w.nc.Write(v[0])
		return err
	}
	w.out = v
	_, err := w.out.WriteTo(w.nc)
	w.out = nil
	return err
}

// fail makes everything that was not sent be dropped.
func (w *replies) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}
