// Package memferry moves memory between machines.
//
// A region is a fixed-size run of bytes: process memory, a file, a disk, an
// object in a store. This package holds what every part of memferry agrees
// on: the [Backend] contract, its optional capabilities, the errors that
// cross package borders, and the class of a transfer. It imports the standard
// library alone, so a backend can be written against it and nothing else.
package memferry

import "io"

const (
	// PageSize is the unit of presence and dirtiness, in bytes.
	PageSize = 4 << 10

	// MaxSize bounds the size of a backend, in bytes (8 EiB less one page),
	// so that offset plus length never overflows an int64.
	MaxSize = 1<<63 - PageSize
)

// Backend is random-access storage of a fixed size.
//
// All methods are safe for concurrent use. Offsets and lengths are in bytes
// and need no alignment, unless [BlockSizes] says otherwise.
//
//   - ReadAt fills p from off. Bytes never written read as zero. A read that
//     reaches past the end returns the bytes before the end and io.EOF; one
//     that ends exactly at the end returns a nil error. A negative offset is
//     [ErrOutOfRange]. The backend does not keep p.
//   - WriteAt writes all of p at off or returns an error. A write that would
//     reach past the end fails with [ErrOutOfRange] and writes nothing; a
//     backend opened read-only fails with [ErrReadOnly]. The backend does not
//     keep or change p. Overlapping writes in flight at once leave, for each
//     byte, the value of one of them.
//   - Size is constant for the life of the backend.
//   - Sync returns nil once every write that was acknowledged before the call
//     survives a crash of the backend's host, as far as its medium can promise
//     that (memory can't). After an error the fate of those writes is unknown.
//   - Close releases everything the backend holds. It is idempotent and
//     unblocks pending calls; calls during or after it return [ErrClosed].
//     Close does not imply Sync.
type Backend interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	Sync() error
	Close() error
}

// CheckRead validates a read of n bytes at off against size and returns how
// many of them exist. It returns io.EOF with fewer than n bytes where the
// range reaches past the end.
func CheckRead(off int64, n int, size int64) (int, error) {
	if off < 0 {
		return 0, rangeError("read", off, int64(n), size)
	}
	if off >= size {
		if n == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	if int64(n) > size-off {
		return int(size - off), io.EOF
	}
	return n, nil
}

// CheckRange validates that [off, off+n) lies within size; op names the
// operation in the error, which is [ErrOutOfRange].
func CheckRange(op string, off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return rangeError(op, off, n, size)
	}
	return nil
}
