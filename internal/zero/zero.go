// Package zero writes zeroes as data, for what can't be told to write them.
package zero

import "sync"

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
