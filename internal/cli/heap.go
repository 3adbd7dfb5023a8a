package cli

import (
	"os"
	"runtime/debug"

	"github.com/memferry/memferry"
)

// heapLimit is what the heap of a mount is to stay below, beside a byte for
// each page: requests that were received (16 MiB), and what serves them. The
// other buffers lie outside of it. Left alone the collector would let it
// double, and a mount with many writes under way pass 64 MiB.
const heapLimit = 24 << 20

// limitHeap tells the runtime the limit for a mount of the given size, unless
// the user has chosen one. It is no hard limit: beyond it, the collector works
// more often.
func limitHeap(size int64) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(heapLimit + size/memferry.PageSize)
	}
}
