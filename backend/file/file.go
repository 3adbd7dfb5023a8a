// Package file is a backend in a regular file, a block device or a memfd.
//
// A file is never truncated, and only grown or created where its size is
// asked for. What a filesystem or device can't do (punch holes, zero ranges,
// tell data from holes) is found out when it is opened, and not offered.
package file

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/gate"
	"github.com/memferry/memferry/internal/size"
)

// Options say how a file is opened. The zero value opens an existing file for
// reading and writing.
type Options struct {
	// ReadOnly opens the file for reading alone.
	ReadOnly bool
	// Size is the size that the file shall have, in bytes; zero takes it as it
	// is. A smaller file is grown and a missing one created, both sparse. A
	// larger one is an error: nothing is ever cut off.
	Size int64
}

func (o Options) validate() error {
	if o.Size < 0 || o.Size > memferry.MaxSize {
		return fmt.Errorf("size %d: must be from 0 to %d", o.Size, int64(memferry.MaxSize))
	}
	return nil
}

// Backend is a file.
type Backend struct {
	f      *os.File
	size   int64
	medium medium
	caps   memferry.Capabilities
	mapped []byte // of a memfd; nil otherwise
	// views holds Close back while mapped is in use, and tells that the
	// backend is closed. Reads and writes need no more: os.File keeps its
	// descriptor until they return.
	views gate.Gate
	known knownData
}

var (
	_ memferry.Backend  = (*Backend)(nil)
	_ memferry.Capabler = (*Backend)(nil)
	_ memferry.Filer    = (*Backend)(nil)
)

// Open opens the file or block device at path.
func Open(path string, o Options) (*Backend, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	// Before the open, which would wait for the other side of a FIFO and may
	// rewind a tape.
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) && o.Size > 0 && !o.ReadOnly {
		return create(path, o)
	}
	if err != nil {
		return nil, notFound(path, o, err)
	}
	if err := checkMode(path, st.Mode()); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, flags(o), 0)
	if err != nil {
		return nil, openError(o, err)
	}
	return New(f, o)
}

func flags(o Options) int {
	if o.ReadOnly {
		return os.O_RDONLY
	}
	return os.O_RDWR
}

func notFound(path string, o Options, err error) error {
	if errors.Is(err, fs.ErrNotExist) && !o.ReadOnly {
		return fmt.Errorf("open %s: %w; to create it, give its size", path, fs.ErrNotExist)
	}
	return err
}

func openError(o Options, err error) error {
	if !o.ReadOnly && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)) {
		return fmt.Errorf("%w; open it read-only, or get permission to write", err)
	}
	return err
}

func checkMode(path string, m fs.FileMode) error {
	switch {
	case m.IsRegular(), m&fs.ModeDevice != 0 && m&fs.ModeCharDevice == 0:
		return nil
	case m.IsDir():
		return fmt.Errorf("%s: is a directory; want a file or block device (for a directory of chunks, write dir:%s)", path, path)
	}
	return fmt.Errorf("%s: is neither a regular file nor a block device (mode %v)", path, m)
}

// create makes a sparse file. Its entry in the directory is durable when it
// returns.
func create(path string, o Options) (*Backend, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	b, err := New(f, o)
	if err == nil {
		err = syncDir(filepath.Dir(path))
		if err == nil {
			return b, nil
		}
		err = errors.Join(err, b.Close())
	}
	return nil, errors.Join(err, os.Remove(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// New makes a backend of an open file and takes it over: it is closed with the
// backend, and also where New fails. Whether it is read-only is what the file
// was opened for, or what o says.
func New(f *os.File, o Options) (*Backend, error) {
	b, err := newBackend(f, o)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return b, nil
}

func newBackend(f *os.File, o Options) (*Backend, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkMode(f.Name(), st.Mode()); err != nil {
		return nil, err
	}
	b := &Backend{f: f, caps: memferry.Capabilities{ReadOnly: o.ReadOnly}}
	if err := b.checkAccess(); err != nil {
		return nil, err
	}
	if st.Mode().IsRegular() {
		b.size = st.Size()
	} else if err := b.openDevice(); err != nil {
		return nil, err
	}
	if err := b.resize(o.Size); err != nil {
		return nil, err
	}
	b.probe()
	return b, nil
}

// checkAccess finds out whether the file was opened for writing.
func (b *Backend) checkAccess() error {
	return b.control("fcntl", func(fd int) error {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		switch flags & unix.O_ACCMODE {
		case unix.O_RDONLY:
			b.caps.ReadOnly = true
		case unix.O_WRONLY:
			return errors.New("opened for writing alone")
		}
		if flags&unix.O_APPEND != 0 {
			return errors.New("opened for appending")
		}
		return nil
	})
}

// resize gives the file the size n, unless it is zero.
func (b *Backend) resize(n int64) error {
	name, has := b.f.Name(), b.size
	switch {
	case n == 0 || n == has:
		return nil
	case b.medium.device:
		return fmt.Errorf("%s: is a block device of %s (%d bytes), not %s", name, size.Format(has), has, size.Format(n))
	case n < has:
		return fmt.Errorf("%s: has %s (%d bytes), more than the size asked for, %s; it is never cut off: remove the file, or leave the size away", name, size.Format(has), has, size.Format(n))
	case b.caps.ReadOnly:
		return fmt.Errorf("%s: has %s (%d bytes), less than the size asked for, %s: %w", name, size.Format(has), has, size.Format(n), memferry.ErrReadOnly)
	}
	if err := b.f.Truncate(n); err != nil {
		return noSpace(err)
	}
	b.size = n
	return nil
}

// Capabilities tells what this file can do.
func (b *Backend) Capabilities() memferry.Capabilities { return b.caps }

// File returns the file itself.
func (b *Backend) File() *os.File { return b.f }

// Size returns the size that the file had, or was given, when it was opened.
func (b *Backend) Size() int64 { return b.size }

// ReadAt reads from the file. A file that was cut off meanwhile is
// memferry.ErrChanged.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	if b.views.Closed() {
		return 0, b.closed("read")
	}
	n, end := memferry.CheckRead(off, len(p), b.size)
	if end != nil && !errors.Is(end, io.EOF) {
		return 0, fmt.Errorf("%s: %w", b.f.Name(), end)
	}
	n, err := b.f.ReadAt(p[:n], off)
	if err == io.EOF {
		return n, fmt.Errorf("%s: read at %d: the file ends before its size of %d: %w", b.f.Name(), off, b.size, memferry.ErrChanged)
	}
	if err != nil {
		return n, err
	}
	return n, end
}

// WriteAt writes to the file.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	if err := b.checkWrite("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := b.f.WriteAt(p, off)
	return n, noSpace(err)
}

// checkWrite validates an operation that changes the file.
func (b *Backend) checkWrite(op string, off, n int64) error {
	if b.views.Closed() {
		return b.closed(op)
	}
	if err := memferry.CheckRange(op, off, n, b.size); err != nil {
		return fmt.Errorf("%s: %w", b.f.Name(), err)
	}
	if b.caps.ReadOnly {
		return fmt.Errorf("%s: %s at %d: %w", b.f.Name(), op, off, memferry.ErrReadOnly)
	}
	return nil
}

func (b *Backend) closed(op string) error {
	return fmt.Errorf("%s: %s: %w", b.f.Name(), op, memferry.ErrClosed)
}

// noSpace makes a full medium recognisable as what this package's users know.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", memferry.ErrNoSpace, err)
	}
	return err
}

// Sync makes the file's data durable, and as much of its metadata as reading
// them back needs (fdatasync(2)). For a block device this flushes its cache.
func (b *Backend) Sync() error {
	if b.views.Closed() {
		return b.closed("sync")
	}
	if b.mapped != nil {
		return nil // memory has nothing to make durable
	}
	return noSpace(b.control("fdatasync", func(fd int) error {
		return ignoringEINTR(func() error { return unix.Fdatasync(fd) })
	}))
}

// Close closes the file. It waits for views, and lets calls that the kernel
// is working on finish by themselves.
func (b *Backend) Close() error {
	if !b.views.Shut() {
		return nil
	}
	<-b.views.Idle()
	var err error
	if len(b.mapped) > 0 {
		err = unix.Munmap(b.mapped)
	}
	return errors.Join(err, b.f.Close())
}

// control runs f with the descriptor, which stays open until f returns.
func (b *Backend) control(op string, f func(fd int) error) error {
	c, err := b.f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := c.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return fmt.Errorf("%s %s: %w", op, b.f.Name(), fs.ErrClosed)
	}
	if inner != nil {
		return &fs.PathError{Op: op, Path: b.f.Name(), Err: inner}
	}
	return nil
}

func ignoringEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Generation returns a tag of the file's identity, size and times. See
// [Backend.Capabilities] for whether there is one.
func (b *Backend) Generation(ctx context.Context) (string, error) {
	if b.views.Closed() {
		return "", b.closed("generation")
	}
	return b.generation(ctx)
}
