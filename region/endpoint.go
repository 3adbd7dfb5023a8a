package region

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/zero"
)

// endpoint is a backend with its capabilities, asked for once.
type endpoint struct {
	memferry.Backend
	can memferry.Capabilities
}

func newEndpoint(b memferry.Backend) endpoint {
	return endpoint{b, memferry.CapabilitiesOf(b)}
}

// zero makes a range read as zero, by the cheapest way there is.
func (e endpoint) zero(ctx context.Context, off, n int64, flags memferry.ZeroFlags) error {
	if e.can.ZeroWriter != nil {
		err := e.can.ZeroWriter.WriteZeroes(off, n, flags)
		if err == nil || !errors.Is(err, memferry.ErrNotSupported) || flags&memferry.ZeroFast != 0 {
			return err
		}
	}
	return zero.Write(off, n, zero.MaxPiece, func(p []byte, off int64) error {
		_, err := e.write(ctx, p, off)
		return err
	})
}

func (e endpoint) write(ctx context.Context, p []byte, off int64) (int, error) {
	if e.can.ContextWriter != nil {
		return e.can.ContextWriter.WriteAtContext(ctx, p, off)
	}
	return e.WriteAt(p, off)
}

// read fills p, all of which must exist.
func (e endpoint) read(ctx context.Context, p []byte, off int64) error {
	var n int
	var err error
	if e.can.ContextReader != nil {
		n, err = e.can.ContextReader.ReadAtContext(ctx, p, off)
	} else {
		n, err = e.ReadAt(p, off)
	}
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read of %d bytes at %d ended after %d: %w", len(p), off, n, err)
}

// timedOut reports whether a remote did not answer in time.
func timedOut(err error) bool {
	return errors.Is(err, memferry.ErrTimeout) || errors.Is(err, context.DeadlineExceeded)
}

// transient reports whether an error of the remote is worth another attempt
// until the deadline: the link failed, not the request.
func transient(err error) bool {
	var ne net.Error
	if errors.As(err, &ne) || timedOut(err) || errors.Is(err, io.EOF) ||
		errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return true
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		switch no {
		case syscall.ECONNRESET, syscall.ECONNREFUSED, syscall.ECONNABORTED, syscall.EPIPE, syscall.ENOTCONN,
			syscall.ETIMEDOUT, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EHOSTDOWN, syscall.ESHUTDOWN:
			return true
		}
	}
	return false
}
