package netsim

import (
	"sync"
	"sync/atomic"
)

// block is a piece of buffer memory that several segments lie in, one after
// the other. It goes back to its pool with the last of them.
type block struct {
	mem  [blockSize]byte
	refs atomic.Int32 // segments, plus one while a reader fills it
}

// blockPool keeps blocks for reuse, the last used first since it is still in
// the processor's caches. It holds at most what was under way at once, which
// Link.Buffer bounds.
type blockPool struct {
	mu     sync.Mutex
	free   []*block
	closed bool
}

func (p *blockPool) get() *block {
	p.mu.Lock()
	defer p.mu.Unlock()
	var b *block
	if n := len(p.free); n > 0 {
		b, p.free[n-1] = p.free[n-1], nil
		p.free = p.free[:n-1]
	} else {
		b = new(block)
	}
	b.refs.Store(1)
	return b
}

func (p *blockPool) release(b *block) {
	if b.refs.Add(-1) > 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.free = append(p.free, b)
	}
}

// drop lets go of the memory.
func (p *blockPool) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free, p.closed = nil, true
}
