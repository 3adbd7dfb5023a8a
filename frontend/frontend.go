// Package frontend holds what the ways of reaching a backend's bytes have in
// common. Each sub-package is one way: frontend/fuse makes them a file.
package frontend

import (
	"context"
	"os"
)

// Device is a backend that has been made reachable to applications. It does
// not own the backend: close the device first, then what it stands on.
type Device interface {
	// Path is where applications find the bytes: a file or a block device.
	Path() string
	// File opens Path, for writing too unless the device is read-only. The
	// caller closes it, before it closes the device. See the caveats of the
	// package that made the device before using it in the same process.
	File() (*os.File, error)
	// Wait returns nil once the device is gone, whoever ended it, and ctx's
	// error when ctx is done first.
	Wait(ctx context.Context) error
	// Close hands everything written to the backend, has it synced, and
	// removes the device. While an application still holds the device it
	// fails with an error that is memferry.ErrInUse, and the device stays;
	// Close can then be called again. It is idempotent.
	Close() error
}
