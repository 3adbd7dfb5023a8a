package fuse

import (
	"fmt"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/memferry/memferry"
)

// invalidator is how a region tells that its bytes are no longer valid.
type invalidator interface {
	WatchInvalidate(before func(off, n int64) error, after func(off, n int64)) (stop func())
}

// watchInvalidate keeps the kernel's copies coherent with a region's.
func (f *fileSystem) watchInvalidate(b memferry.Backend) (stop func()) {
	v, ok := b.(invalidator)
	if !ok {
		return func() {}
	}
	return v.WatchInvalidate(f.opens.forgoPassthrough, f.invalidated)
}

// forgoPassthrough ends the use of the local file as a whole, before parts of
// it become invalid. What the kernel reads without us can't be taken back.
func (s *openState) forgoPassthrough(_, _ int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.backingID != 0 {
		return fmt.Errorf("the kernel reads the local copy by itself (passthrough); unmount first: %w", memferry.ErrInUse)
	}
	s.refused = true
	return nil
}

// invalidated drops the kernel's page cache of a range. It writes out what is
// dirty there first, which is newer than what was dropped.
func (f *fileSystem) invalidated(off, n int64) {
	if st := f.opens.server.InodeNotify(f.fileNode, off, n); !st.Ok() && st != gofuse.ENOENT {
		f.log.Warn("the kernel's copy of the file could not be dropped", "offset", off, "bytes", n, "err", st)
	}
}
