package fuse

import (
	"os"
	"sync"
	"syscall"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
)

// Handles tell the kinds of opens apart. There is no other state per handle.
const (
	handleReader uint64 = iota + 1
	handleWriter
	handlePassthrough
)

// openState decides how the file is opened. The kernel wants all handles of
// an inode that use the page cache, or all that bypass it, but not both
// (fs/fuse/iomode.c); an open of the other kind fails with EIO. So passthrough
// starts with an open that finds no handle of the first kind, and lasts until
// the end of the mount.
type openState struct {
	server  *gofuse.Server
	backing func() *os.File // nil: never passthrough

	mu        sync.Mutex
	cached    int // handles through the page cache, writers among them
	writers   int
	through   int // handles with passthrough
	backingID int32
	refused   bool // the kernel refused passthrough: don't ask again
}

func (s *openState) init(f *fileSystem, o Options) {
	if o.NoPassthrough || !o.ReadOnly {
		return
	}
	s.backing = f.completeFile
}

// completeFile returns the regular file that holds exactly the backend's
// bytes, or nil.
func (f *fileSystem) completeFile() *os.File {
	var file *os.File
	switch {
	case f.local != nil:
		if f.local.Complete() {
			file = f.local.LocalFile()
		}
	case f.caps.Filer != nil:
		file = f.caps.Filer.File()
	}
	if file == nil {
		return nil
	}
	// A longer file would show bytes past the end: passthrough reads the
	// backing file to its own end.
	st, err := file.Stat()
	if err != nil || !st.Mode().IsRegular() || st.Size() != f.size {
		return nil
	}
	return file
}

func (s *openState) writable() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writers
}

// usesPassthrough reports whether opens bypass us.
func (s *openState) usesPassthrough() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.backingID != 0
}

// tryPassthroughLocked returns whether an open may pass through.
func (s *openState) tryPassthroughLocked(f *fileSystem) bool {
	if s.backingID != 0 {
		return true
	}
	if s.backing == nil || s.refused || s.cached > 0 || s.server == nil ||
		s.server.KernelSettings().Flags64()&gofuse.CAP_PASSTHROUGH == 0 {
		return false
	}
	file := s.backing()
	if file == nil {
		return false
	}
	id, errno := s.server.RegisterBackingFd(&gofuse.BackingMap{Fd: int32(file.Fd())})
	if errno != 0 {
		s.refused = true
		f.log.Debug("no passthrough", "err", errno)
		return false
	}
	s.backingID = id
	return true
}

// Open chooses how a handle works.
func (f *fileSystem) Open(_ <-chan struct{}, in *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	if in.NodeId != f.fileNode {
		return gofuse.EINVAL
	}
	write := in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY
	if write && f.readOnly {
		return gofuse.EROFS
	}
	s := &f.opens
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tryPassthroughLocked(f) {
		s.through++
		out.Fh, out.OpenFlags, out.BackingID = handlePassthrough, gofuse.FOPEN_PASSTHROUGH, s.backingID
		return gofuse.OK
	}
	s.cached++
	out.Fh, out.OpenFlags = handleReader, gofuse.FOPEN_KEEP_CACHE
	if write {
		s.writers++
		out.Fh = handleWriter
	}
	// An append lies past the end: it is to be refused at once, not at fsync.
	if f.uncached || write && in.Flags&syscall.O_APPEND != 0 {
		out.OpenFlags |= gofuse.FOPEN_DIRECT_IO
	}
	return gofuse.OK
}

// Release ends a handle.
func (f *fileSystem) Release(_ <-chan struct{}, in *gofuse.ReleaseIn) {
	s := &f.opens
	s.mu.Lock()
	defer s.mu.Unlock()
	switch in.Fh {
	case handlePassthrough:
		s.through--
	case handleWriter:
		s.writers--
		s.cached--
	case handleReader:
		s.cached--
	}
}
