package memferry

import (
	"errors"
	"fmt"
	"io/fs"
)

// Errors that cross package borders. Implementations wrap them, so compare
// with [errors.Is].
var (
	// ErrClosed is returned by calls on a closed object. It is fs.ErrClosed,
	// so os and net errors match as well.
	ErrClosed = fs.ErrClosed

	// ErrReadOnly is returned by a write to something that can't be written.
	ErrReadOnly = errors.New("read-only")

	// ErrOutOfRange is returned where an offset or a length leaves the backend.
	ErrOutOfRange = errors.New("out of range")

	// ErrNotSupported is returned where a backend, kernel or peer lacks a
	// feature. It is errors.ErrUnsupported.
	ErrNotSupported = errors.ErrUnsupported

	// ErrChanged is returned when a remote is no longer the one that was
	// opened: its size or its generation differs.
	ErrChanged = errors.New("remote changed")

	// ErrTimeout is returned when a remote did not answer before the deadline
	// the user chose.
	ErrTimeout = errors.New("deadline exceeded")

	// ErrCorrupt is returned when stored state fails its checks.
	ErrCorrupt = errors.New("corrupt")

	// ErrInUse is returned when a cache, mountpoint, socket or device is
	// already held by another process.
	ErrInUse = errors.New("in use")

	// ErrNoSpace is returned when a medium is full.
	ErrNoSpace = errors.New("no space left")
)

func rangeError(op string, off, n, size int64) error {
	return fmt.Errorf("%s of %d bytes at %d, size %d: %w", op, n, off, size, ErrOutOfRange)
}
