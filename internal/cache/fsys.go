package cache

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/memferry/memferry"
)

// fsys is the cache's directory, as far as state and journals are concerned.
// Tests put a simulated disk here.
type fsys interface {
	// list returns the names in the directory.
	list() ([]string, error)
	// read returns the content of a file of at most limit bytes.
	read(name string, limit int64) ([]byte, error)
	// create makes an empty file, whether there is one or not; open opens one.
	create(name string) (handle, error)
	open(name string) (handle, error)
	rename(from, to string) error
	remove(name string) error
	// syncDir makes what the three above did durable.
	syncDir() error
}

// handle is an open file of a fsys.
type handle interface {
	io.WriterAt
	Truncate(size int64) error
	Sync() error
	Close() error
}

// osDir is the real thing.
type osDir string

func (d osDir) path(name string) string { return filepath.Join(string(d), name) }

func (d osDir) list() ([]string, error) {
	entries, err := os.ReadDir(string(d))
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func (d osDir) read(name string, limit int64) ([]byte, error) {
	f, err := os.Open(d.path(name))
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > limit {
		return nil, fmt.Errorf("%s: %d bytes, limit %d: %w", d.path(name), st.Size(), limit, memferry.ErrCorrupt)
	}
	p := make([]byte, st.Size())
	_, err = io.ReadFull(f, p)
	return p, err
}

func (d osDir) create(name string) (handle, error) {
	return osFile(os.OpenFile(d.path(name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600))
}

func (d osDir) open(name string) (handle, error) {
	return osFile(os.OpenFile(d.path(name), os.O_RDWR, 0))
}

// osFile keeps a nil *os.File from becoming a handle that is not nil.
func osFile(f *os.File, err error) (handle, error) {
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (d osDir) rename(from, to string) error { return os.Rename(d.path(from), d.path(to)) }

func (d osDir) remove(name string) error {
	err := os.Remove(d.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (d osDir) syncDir() error {
	f, err := os.Open(string(d))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// noSpace makes the several ways to say that a medium is full one.
func noSpace(err error) error {
	if err == nil || errors.Is(err, memferry.ErrNoSpace) {
		return err
	}
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, full) {
			return fmt.Errorf("%w: %w", memferry.ErrNoSpace, err)
		}
	}
	return err
}
