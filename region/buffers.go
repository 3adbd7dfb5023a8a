package region

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// buffers are for what can't be passed on from where it lies: requests to
// remotes that can't stream, and pushes from a local side that is no memory.
// They lie outside of the Go heap, where the collector would let as much again
// pile up before it runs. The lowest free pages are used first, so that little
// work touches little memory.
type buffers struct {
	mem []byte // nil: all come from the heap

	mu   sync.Mutex
	used []bool // by page of mem
}

// newBuffers makes room for so many bytes, which the kernel gives as they are
// used.
func newBuffers(size int64) (*buffers, error) {
	b := &buffers{used: make([]bool, size/pageSize)}
	if size == 0 {
		return b, nil
	}
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map buffers: %w", err)
	}
	b.mem = mem
	return b, nil
}

// close unmaps the buffers; none may be in use.
func (b *buffers) close() error {
	if b.mem == nil {
		return nil
	}
	mem := b.mem
	b.mem, b.used = nil, nil
	return unix.Munmap(mem)
}

// buffer is n bytes at p, for put.
type buffer struct {
	p     []byte
	page  int // of mem
	pages int // 0: from the heap
}

// get returns a buffer of n bytes. It never waits: the pacers bound what
// background work takes, and what comes beyond them, which is demand, gets it
// from the heap where there is no room.
func (b *buffers) get(n int64) buffer {
	pages := int((n + pageSize - 1) / pageSize)
	b.mu.Lock()
	defer b.mu.Unlock()
	page := b.findLocked(pages)
	if page < 0 {
		return buffer{p: make([]byte, n)}
	}
	for i := range pages {
		b.used[page+i] = true
	}
	off := int64(page) * pageSize
	return buffer{p: b.mem[off : off+n : off+n], page: page, pages: pages}
}

// findLocked returns the first of so many free pages in a row, -1 if there are
// none.
func (b *buffers) findLocked(pages int) int {
	free := 0
	for i, used := range b.used {
		if free++; used {
			free = 0
		}
		if free == pages {
			return i + 1 - pages
		}
	}
	return -1
}

func (b *buffers) put(f buffer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.used[f.page : f.page+f.pages])
}
