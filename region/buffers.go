package region

import (
	"math/bits"
	"sync"
)

// buffers are for what can't be passed on from where it lies: requests to
// remotes that can't stream, and pushes from a local side that is no memory.
// There is one pool for each power of two from a page to maxFetch, so that
// maxBuffered and maxDemand bound their memory however short the requests are.
var buffers [bits.UintSize]sync.Pool

func bufferClass(n int64) int { return bits.Len64(uint64(max(n, pageSize) - 1)) }

// getBuffer returns a buffer of n bytes, at most maxFetch, for putBuffer.
func getBuffer(n int64) *[]byte {
	class := bufferClass(n)
	b, _ := buffers[class].Get().(*[]byte)
	if b == nil {
		p := make([]byte, 1<<class)
		b = &p
	}
	*b = (*b)[:n]
	return b
}

func putBuffer(b *[]byte) { buffers[bufferClass(int64(cap(*b)))].Put(b) }
