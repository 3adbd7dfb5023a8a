package uffd

import (
	"sync/atomic"
	"unsafe"
)

// words is memory as counters.
func words(p []byte) []atomic.Uint64 {
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(p))), len(p)/8)
}

// bytesAt is n bytes at an address.
func bytesAt(p unsafe.Pointer, n int) []byte { return unsafe.Slice((*byte)(p), n) }

func pointer(p []byte) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(p)) }
