package mem

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// hugeSize is the size of a transparent huge page on both architectures
	// (with pages of 4 KiB); the advice is harmless where it is another.
	hugeSize = 2 << 20
	// hugeWrite is the shortest write that is worth asking for one.
	hugeWrite = 64 << 10
	// maxIslands bounds how many separate ranges of huge pages are asked for.
	// Each costs up to two mappings, of which a process has 65530 by default
	// (vm.max_map_count), shared with the Go runtime.
	maxIslands = 4096
)

// huge asks for huge pages where they pay.
type huge struct {
	units   int64           // whole huge pages in the mapping
	advised []atomic.Uint64 // a bit for each
	islands atomic.Int64
}

func (h *huge) isAdvised(u int64) bool {
	return 0 <= u && u < h.units && h.advised[u/64].Load()>>(u%64)&1 == 1
}

// advise prepares for a write of n bytes at off.
func (b *Backend) advise(off, n int64) {
	if n < hugeWrite {
		return
	}
	for u := off / hugeSize; u <= (off+n-1)/hugeSize && u < b.huge.units; u++ {
		if !b.huge.isAdvised(u) && b.worthHuge(u) {
			b.adviseUnit(u)
		}
	}
}

// worthHuge reports whether huge page u is unused and follows one that is not,
// as in a sequential write. Anything else would let sparse data grow.
func (b *Backend) worthHuge(u int64) bool {
	first := u * hugeSize
	if _, data := b.run(first, 1); data {
		return false
	}
	if n, _ := b.run(first, hugeSize); n < hugeSize {
		return false
	}
	if u == 0 {
		return true
	}
	n, data := b.run(first-hugeSize, hugeSize)
	return data || n < hugeSize
}

func (b *Backend) adviseUnit(u int64) {
	h := &b.huge
	if !h.isAdvised(u-1) && !h.isAdvised(u+1) {
		if h.islands.Load() >= maxIslands {
			return
		}
		h.islands.Add(1)
	}
	h.advised[u/64].Or(1 << (u % 64))
	// Failing costs speed alone: no such feature, or too many mappings.
	_ = unix.Madvise(b.data[u*hugeSize:(u+1)*hugeSize], unix.MADV_HUGEPAGE)
}
