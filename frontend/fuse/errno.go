package fuse

import (
	"context"
	"errors"
	"syscall"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/memferry/memferry"
)

// toStatus chooses the errno that an application sees for a backend's error.
func toStatus(err error) gofuse.Status {
	switch {
	case err == nil:
		return gofuse.OK
	case errors.Is(err, context.Canceled):
		return gofuse.EINTR
	case errors.Is(err, memferry.ErrReadOnly):
		return gofuse.EROFS
	case errors.Is(err, memferry.ErrNoSpace), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return gofuse.Status(syscall.ENOSPC)
	case errors.Is(err, memferry.ErrChanged):
		return gofuse.Status(syscall.ESTALE)
	case errors.Is(err, memferry.ErrOutOfRange):
		return gofuse.EINVAL
	case errors.Is(err, memferry.ErrNotSupported):
		return gofuse.Status(syscall.EOPNOTSUPP)
	}
	return gofuse.EIO // ErrTimeout, ErrClosed, ErrCorrupt and the rest
}
