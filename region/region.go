// Package region is the engine of a managed mount: a remote backend made
// usable here at once, the rest of it pulled in the background, and writes
// pushed back.
package region

import (
	"context"
	"errors"
	"os"

	"github.com/memferry/memferry"
)

// Region is a remote backend and its local copy. It is a [memferry.Backend].
type Region struct{}

var errTODO = errors.New("region: not implemented yet")

// Open joins remote and local into a region and takes ownership of both: they
// are closed by Close, or by Open itself when it fails.
func Open(ctx context.Context, remote, local memferry.Backend, o Options) (*Region, error) {
	return nil, errTODO
}

func (r *Region) ReadAt(p []byte, off int64) (int, error)  { return 0, errTODO }
func (r *Region) WriteAt(p []byte, off int64) (int, error) { return 0, errTODO }
func (r *Region) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return 0, errTODO
}
func (r *Region) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return 0, errTODO
}
func (r *Region) Trim(off, n int64) error                                  { return errTODO }
func (r *Region) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error { return errTODO }
func (r *Region) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	return nil, errTODO
}
func (r *Region) ReadOnly() bool { return false }
func (r *Region) Size() int64    { return 0 }
func (r *Region) Sync() error    { return errTODO }
func (r *Region) Close() error   { return errTODO }

// Pull waits until everything is local.
func (r *Region) Pull(ctx context.Context) error { return errTODO }

// Push returns nil once everything that was dirty when it was called has been
// accepted and synced by the remote.
func (r *Region) Push(ctx context.Context) error { return errTODO }

// Stats returns a snapshot.
func (r *Region) Stats() Stats { return Stats{} }

// Resident reports whether a read of n bytes at off needs no remote.
func (r *Region) Resident(off, n int64) bool { return false }

// View returns the n bytes at off for reading, without a copy, or false where
// they are not all resident or the local backend is not memory. The caller
// must call ReleaseView once after true. Concurrent writes show in the view.
func (r *Region) View(off, n int64) ([]byte, bool) { return nil, false }

// ReleaseView ends the use of one view.
func (r *Region) ReleaseView() {}

// LocalFile returns the file that holds the local copy, offset by offset, or
// nil. It belongs to the region. Only resident ranges of it are valid.
func (r *Region) LocalFile() *os.File { return nil }

// Complete reports whether everything is local.
func (r *Region) Complete() bool { return false }

// Done is closed once everything is local.
func (r *Region) Done() <-chan struct{} { return nil }
