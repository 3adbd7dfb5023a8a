package nbd

import (
	"context"
	"math/bits"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Size classes of pooled buffers. Requests for more than the largest class get
// memory of their own, given back to the kernel after use.
const (
	minClassShift = 12 // 4 KiB
	maxClassShift = 20 // 1 MiB
	numClasses    = maxClassShift - minClassShift + 1
)

// buffer is memory for the data of one request. It is a mapping of its own,
// outside the Go heap, so that what the pool hands out and keeps is all there
// is: garbage that waits for a collection would break the bound.
type buffer struct {
	b     []byte // as long as was asked for
	mem   []byte // the whole mapping
	class int    // -1: not pooled
}

// memoryPool hands out buffers, at most limit bytes at any time over all
// connections of a server, those kept for reuse included. Whoever asks for
// more waits, first come first served.
type memoryPool struct {
	limit int64
	keep  int64 // most bytes kept for reuse

	mu      sync.Mutex
	used    int64 // mapped bytes handed out
	idle    int64 // mapped bytes kept in free
	free    [numClasses][]*buffer
	waiters []*poolWaiter
	closed  bool
}

type poolWaiter struct {
	n     int64
	ready chan struct{} // closed once n bytes are reserved for the waiter
}

func newMemoryPool(limit int64) *memoryPool {
	return &memoryPool{limit: limit, keep: limit / 2}
}

// classOf returns the size class for n bytes and how much memory it takes.
func classOf(n int) (class int, size int64) {
	if n <= 1<<minClassShift {
		return 0, 1 << minClassShift
	}
	if n > 1<<maxClassShift {
		const page = 1 << minClassShift
		return -1, (int64(n) + page - 1) &^ (page - 1)
	}
	shift := bits.Len(uint(n - 1))
	return shift - minClassShift, 1 << shift
}

// tryGet returns a buffer of n bytes, or nil where that would exceed the limit
// or jump the queue.
func (p *memoryPool) tryGet(n int) (*buffer, error) {
	class, size := classOf(n)
	p.mu.Lock()
	if class >= 0 && len(p.waiters) == 0 {
		if list := p.free[class]; len(list) > 0 {
			b := list[len(list)-1]
			p.free[class] = list[:len(list)-1]
			p.idle -= size
			p.used += size
			p.mu.Unlock()
			b.b = b.mem[:n]
			return b, nil
		}
	}
	ok := len(p.waiters) == 0 && p.reserveLocked(size)
	p.mu.Unlock()
	if !ok {
		return nil, nil
	}
	return p.allocate(n, class, size)
}

// get is tryGet that waits for memory, and meanwhile calls onTick upon each
// tick.
func (p *memoryPool) get(ctx context.Context, n int, tick <-chan time.Time, onTick func()) (*buffer, error) {
	b, err := p.tryGet(n)
	if b != nil || err != nil {
		return b, err
	}
	class, size := classOf(n)
	w := &poolWaiter{n: size, ready: make(chan struct{})}
	p.mu.Lock()
	p.waiters = append(p.waiters, w)
	p.grantLocked()
	p.mu.Unlock()
	for {
		select {
		case <-w.ready:
			return p.allocate(n, class, size)
		case <-ctx.Done():
			p.abandon(w)
			return nil, ctx.Err()
		case <-tick:
			onTick()
		}
	}
}

// reserveLocked counts size bytes as used if the limit allows it, for which it
// gives idle buffers back to the kernel.
func (p *memoryPool) reserveLocked(size int64) bool {
	if p.used+size > p.limit {
		return false
	}
	for class := numClasses - 1; class >= 0 && p.used+p.idle+size > p.limit; class-- {
		for len(p.free[class]) > 0 && p.used+p.idle+size > p.limit {
			p.dropLocked(class)
		}
	}
	p.used += size
	return true
}

func (p *memoryPool) dropLocked(class int) {
	list := p.free[class]
	b := list[len(list)-1]
	list[len(list)-1] = nil
	p.free[class] = list[:len(list)-1]
	p.idle -= int64(len(b.mem))
	unmap(b)
}

// grantLocked lets waiters go on, in order, as far as memory reaches.
func (p *memoryPool) grantLocked() {
	for len(p.waiters) > 0 && p.reserveLocked(p.waiters[0].n) {
		close(p.waiters[0].ready)
		p.waiters = p.waiters[1:]
	}
}

// abandon takes w off the queue, or gives back what it was granted meanwhile.
func (p *memoryPool) abandon(w *poolWaiter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, o := range p.waiters {
		if o == w {
			p.waiters = append(p.waiters[:i], p.waiters[i+1:]...)
			p.grantLocked()
			return
		}
	}
	p.used -= w.n
	p.grantLocked()
}

// allocate makes the buffer for which size bytes were reserved.
func (p *memoryPool) allocate(n, class int, size int64) (*buffer, error) {
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		p.mu.Lock()
		p.used -= size
		p.grantLocked()
		p.mu.Unlock()
		return nil, ENOMEM
	}
	return &buffer{b: mem[:n], mem: mem, class: class}, nil
}

// put takes b back. The caller must not touch it afterwards.
func (p *memoryPool) put(b *buffer) {
	size := int64(len(b.mem))
	b.b = nil
	p.mu.Lock()
	p.used -= size
	keep := b.class >= 0 && p.idle+size <= p.keep && !p.closed
	if keep {
		p.idle += size
		p.free[b.class] = append(p.free[b.class], b)
	}
	p.grantLocked()
	p.mu.Unlock()
	if !keep {
		unmap(b)
	}
}

// close gives idle buffers back, now and from here on.
func (p *memoryPool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for class := range p.free {
		for len(p.free[class]) > 0 {
			p.dropLocked(class)
		}
	}
}

func (p *memoryPool) inUse() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.used
}

// unmap can fail only for an address that is not a mapping.
func unmap(b *buffer) { _ = unix.Munmap(b.mem) }
