package fuse

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// reply is the data of one read: a slice of the backend's memory or of the
// arena, sent with writev from where it lies and released once sent.
type reply struct {
	iov  [1][]byte
	f    *fileSystem
	kind replyKind
	slot int32
}

type replyKind uint8

const (
	replyBuffer replyKind = iota // the library's buffer
	replySlot                    // of the arena
	replyView                    // of the backend's Viewer
	replyRegion                  // of a region's resident part
)

var replies = sync.Pool{New: func() any { return new(reply) }}

func (f *fileSystem) reply(kind replyKind, p []byte) *reply {
	r := replies.Get().(*reply)
	r.f, r.kind, r.iov[0] = f, kind, p
	return r
}

// Bytes is only called by transports that can't take slices.
func (r *reply) Bytes([]byte) ([]byte, gofuse.Status) { return r.iov[0], gofuse.OK }

// Slices makes the library send the data with writev.
func (r *reply) Slices() ([][]byte, gofuse.Status) { return r.iov[:], gofuse.OK }

// Size is the length of the data.
func (r *reply) Size() int { return len(r.iov[0]) }

// Done releases the data after it was sent.
func (r *reply) Done() {
	switch r.kind {
	case replySlot:
		r.f.buffers.put(r.slot)
	case replyView:
		r.f.caps.Viewer.ReleaseView()
	case replyRegion:
		r.f.resident.ReleaseView()
	}
	*r = reply{}
	replies.Put(r)
}

// Read answers from the cheapest place that has the data.
func (f *fileSystem) Read(cancel <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	n := f.clamp(in.Offset, uint64(in.Size))
	if n == 0 {
		return f.reply(replyBuffer, nil), gofuse.OK
	}
	off := int64(in.Offset)
	if f.resident != nil {
		if p, ok := f.resident.View(off, n); ok {
			return f.reply(replyRegion, p), gofuse.OK
		}
	} else if f.caps.Viewer != nil {
		if p, err := f.caps.Viewer.View(off, n); err == nil {
			return f.reply(replyView, p), gofuse.OK
		}
	}
	return f.readInto(cancel, in, buf, off, int(n))
}

// readInto reads through a buffer.
func (f *fileSystem) readInto(cancel <-chan struct{}, in *gofuse.ReadIn, buf []byte, off int64, n int) (gofuse.ReadResult, gofuse.Status) {
	ctx := f.requestContext(cancel, &in.InHeader)
	defer ctx.finish()
	r := f.reply(replyBuffer, nil)
	if n <= smallRead && n <= len(buf) {
		r.iov[0] = buf[:n]
	} else {
		slot, err := f.buffers.get(ctx)
		if err != nil {
			r.Done()
			return nil, toStatus(err)
		}
		r.kind, r.slot = replySlot, slot
		r.iov[0] = f.buffers.bytes(slot, n)
	}
	if err := f.fill(ctx, r.iov[0], off); err != nil {
		r.Done()
		f.log.Warn("read failed", "offset", off, "length", n, "err", err)
		return nil, toStatus(err)
	}
	return r, gofuse.OK
}

// fill reads all of p, which lies within the size.
func (f *fileSystem) fill(ctx context.Context, p []byte, off int64) error {
	var n int
	var err error
	if f.caps.ContextReader != nil {
		n, err = f.caps.ContextReader.ReadAtContext(ctx, p, off)
	} else {
		n, err = f.backend.ReadAt(p, off)
	}
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Write stores data. One that reaches past the end fails with ENOSPC and, like
// a backend's, stores nothing. From the write-back cache it stores what fits,
// because it may be the tail of what several applications wrote, and the size
// that the kernel has assumed is put right.
func (f *fileSystem) Write(cancel <-chan struct{}, in *gofuse.WriteIn, data []byte) (uint32, gofuse.Status) {
	if f.readOnly {
		return 0, gofuse.EROFS
	}
	n := f.clamp(in.Offset, uint64(len(data)))
	cached := in.WriteFlags&gofuse.WRITE_CACHE != 0
	fits := n == int64(len(data))
	if n > 0 && (fits || cached) {
		if err := f.store(cancel, in, data[:n]); err != nil {
			return 0, toStatus(err)
		}
	}
	if fits {
		return uint32(n), gofuse.OK
	}
	if f.writeBack && cached {
		// Only what was cached has made the file look longer; to repair
		// after others would cut off cached writes that nobody has refused.
		f.repairSize()
	}
	return 0, gofuse.Status(syscall.ENOSPC)
}

func (f *fileSystem) store(cancel <-chan struct{}, in *gofuse.WriteIn, p []byte) error {
	var err error
	if f.caps.ContextWriter != nil {
		ctx := f.requestContext(cancel, &in.InHeader)
		_, err = f.caps.ContextWriter.WriteAtContext(ctx, p, int64(in.Offset))
		ctx.finish()
	} else {
		_, err = f.backend.WriteAt(p, int64(in.Offset))
	}
	f.noteWrite("write", err)
	return err
}

// noteWrite logs a failure, which the kernel may have nobody to tell.
func (f *fileSystem) noteWrite(op string, err error) {
	if err != nil {
		f.log.Warn(op+" failed", "err", err)
		return
	}
	if !f.writeBack {
		f.attrs.touch()
	}
}

// mountedFile is the file as an application sees it.
type mountedFile struct {
	path string
	dev  uint64
}

// with opens the file, makes sure that it is still this mount, and passes it
// to f; see outside.
func (m *mountedFile) with(flags int, f func(fd int) error) error {
	return outside(func() error {
		fd, err := openRetry(m.path, flags|unix.O_CLOEXEC)
		if err != nil {
			return errNotMounted
		}
		defer unix.Close(fd) //nolint:errcheck // what f did to it has an answer
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Dev != m.dev {
			return errNotMounted
		}
		return f(fd)
	})
}

// errNotMounted says that the file is not at its place any more.
var errNotMounted = errors.New("not mounted")

func openRetry(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// repairSize makes the kernel forget the size it has assumed for writes past
// the end. It trusts only a truncation, so we ask for one from outside, like
// an application, and answer it ourselves (fuse_do_setattr in fs/fuse/dir.c).
// It waits for the writes under way, hence must not run within one of them.
func (f *fileSystem) repairSize() {
	self := f.self.Load()
	if self == nil || !f.repairing.CompareAndSwap(false, true) {
		return
	}
	f.repairs.Go(func() {
		err := self.with(unix.O_WRONLY, func(fd int) error {
			f.repairing.Store(false) // a write from now on may need another one
			return unix.Ftruncate(fd, f.size)
		})
		f.repairing.Store(false)
		if err != nil && !errors.Is(err, errNotMounted) {
			f.log.Warn("can't put the size right after a write past the end", "err", err)
		}
	})
}

// writeOutDirty makes the kernel write out its cache before a question about
// extents, as lseek does not. Dirty pages exist only while a writable handle
// does: the last close and the last unmapping write them out. The inode is
// locked meanwhile, which fsync would wait for and sync_file_range does not.
func (f *fileSystem) writeOutDirty() {
	self := f.self.Load()
	if !f.writeBack || self == nil || f.opens.writable() == 0 {
		return
	}
	err := self.with(unix.O_RDONLY, func(fd int) error {
		const flags = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		return unix.SyncFileRange(fd, 0, 0, flags)
	})
	if err != nil && !errors.Is(err, errNotMounted) {
		f.log.Warn("write-out before a seek failed", "err", err)
	}
}
