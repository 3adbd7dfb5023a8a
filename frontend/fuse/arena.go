package fuse

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// arenaSlots bounds the memory of reads that wait for a backend, together
	// with maxRequest. Reads beyond it queue. With maxPendingInput and the
	// program itself it keeps a mount below 64 MiB, and still fills 4 Gbit/s at
	// 50 ms.
	arenaSlots = 24
	// regionSlots is that for a region, which has buffers of its own, and where
	// the pull, not the reads, has to fill the link.
	regionSlots = 12
)

// smallRead is up to where a read uses the library's own buffer and never
// queues, so that a short one does not wait behind long ones.
const smallRead = 16 << 10

// arena hands out buffers of maxRequest bytes. They lie outside of the Go
// heap, so that the collector neither doubles nor clears them, and the last
// one returned is the next one used, so that an idle mount touches few.
type arena struct {
	free chan struct{} // one token per free slot

	mu    sync.Mutex
	mem   []byte
	slots []int32
}

func newArena(slots int) (*arena, error) {
	mem, err := unix.Mmap(-1, 0, slots*maxRequest, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map read buffers: %w", err)
	}
	a := &arena{free: make(chan struct{}, slots), mem: mem}
	for i := int32(slots - 1); i >= 0; i-- {
		a.slots = append(a.slots, i)
		a.free <- struct{}{}
	}
	return a, nil
}

// get waits for a slot, or until ctx is done.
func (a *arena) get(ctx context.Context) (int32, error) {
	select {
	case <-a.free:
	default:
		select {
		case <-a.free:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	slot := a.slots[len(a.slots)-1]
	a.slots = a.slots[:len(a.slots)-1]
	return slot, nil
}

func (a *arena) bytes(slot int32, n int) []byte {
	off := int(slot) * maxRequest
	return a.mem[off : off+n : off+maxRequest]
}

func (a *arena) put(slot int32) {
	a.mu.Lock()
	a.slots = append(a.slots, slot)
	a.mu.Unlock()
	a.free <- struct{}{}
}

// close unmaps the slots; none may be in use.
func (a *arena) close() error { return unix.Munmap(a.mem) }
