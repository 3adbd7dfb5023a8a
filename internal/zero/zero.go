// Package zero recognises zeroes, and writes them as data for what can't be told
// to write them.
package zero

import (
	"bytes"
	"sync"
)

// MaxPiece is the longest run of zeroes that is written at once, in bytes.
const MaxPiece = 1 << 20

var zeroes = sync.OnceValue(func() []byte { return make([]byte, MaxPiece) })

// Write calls write for pieces of at most piece bytes, and of at most
// MaxPiece, that cover [off, off+n) in order. It stops at the first error.
// write must not change or keep p, which all callers share.
func Write(off, n, piece int64, write func(p []byte, off int64) error) error {
	piece = min(piece, MaxPiece)
	for n > 0 {
		p := zeroes()[:min(n, piece)]
		if err := write(p, off); err != nil {
			return err
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}

// known is compared with: little enough to stay in the processor's cache.
var known [64 << 10]byte

// Is reports whether p holds nothing but zeroes.
func Is(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(known))
		if !bytes.Equal(p[:n], known[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
