package fuse

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/memferry/memferry"
)

const (
	rootNode = gofuse.FUSE_ROOT_ID
	// childNode is the file's where the root is a directory.
	childNode = 2

	// attrValid is how long the kernel may keep attributes and names: for
	// ever, as they only change through it.
	attrValid = 365 * 24 * time.Hour

	blockSize = memferry.PageSize
)

// fileSystem answers the kernel's requests (include/uapi/linux/fuse.h).
type fileSystem struct {
	gofuse.RawFileSystem // answers ENOSYS to what is not here

	backend  memferry.Backend
	caps     memferry.Capabilities
	resident residentViewer // nil unless the backend is a region or like one
	local    residentFile   // likewise
	size     int64
	name     string
	fileNode uint64 // rootNode or childNode
	readOnly bool
	// writeBack says that the kernel caches writes and owns size and times.
	writeBack bool
	// uncached says that reads and writes are not to stop at its page cache.
	uncached bool
	log      *slog.Logger
	buffers  *arena
	calls    uncancelled
	// ended is closed when requests still in flight must be given up.
	ended   chan struct{}
	endOnce sync.Once
	// gone reports that the mount is not there any more; slow.
	gone func() bool
	// self is the mounted file's path and device, for the few things that only
	// a caller from outside can make the kernel do. Set after the mount.
	self atomic.Pointer[mountedFile]

	attrs attributes
	opens openState
	// repairing keeps to one attempt at a time.
	repairing atomic.Bool
	repairs   sync.WaitGroup
}

// attributes are what the file's owner can change.
type attributes struct {
	mu                  sync.Mutex
	mode                uint32
	uid, gid            uint32
	atime, mtime, ctime time.Time
}

func newFileSystem(b memferry.Backend, caps memferry.Capabilities, o Options, fileRoot bool) (*fileSystem, error) {
	size := b.Size()
	if size < 0 || size > memferry.MaxSize {
		return nil, fmt.Errorf("backend of %d bytes: not a size that can be mounted", size)
	}
	slots := arenaSlots
	if _, ok := b.(residentFile); ok {
		slots = regionSlots
	}
	buffers, err := newArena(slots)
	if err != nil {
		return nil, err
	}
	f := &fileSystem{
		RawFileSystem: gofuse.NewDefaultRawFileSystem(),
		backend:       b,
		caps:          caps,
		size:          size,
		name:          o.Name,
		fileNode:      childNode,
		readOnly:      o.ReadOnly,
		writeBack:     !o.ReadOnly && !fileRoot && !o.Uncached,
		uncached:      o.Uncached,
		log:           o.Logger,
		buffers:       buffers,
		calls:         newUncancelled(),
		ended:         make(chan struct{}),
		gone:          func() bool { return false },
	}
	if fileRoot {
		f.fileNode = rootNode
	}
	f.resident, _ = b.(residentViewer)
	f.local, _ = b.(residentFile)
	f.opens.init(f, o)
	now := time.Now()
	f.attrs = attributes{
		mode: uint32(o.Mode), uid: uint32(os.Geteuid()), gid: uint32(os.Getegid()),
		atime: now, mtime: now, ctime: now,
	}
	return f, nil
}

// giveUp cancels the requests in flight, and those to come.
func (f *fileSystem) giveUp() { f.endOnce.Do(func() { close(f.ended) }) }

func (f *fileSystem) String() string { return fsType }

// fillAttr describes a node.
func (f *fileSystem) fillAttr(node uint64, out *gofuse.Attr) {
	f.attrs.mu.Lock()
	defer f.attrs.mu.Unlock()
	a := &f.attrs
	*out = gofuse.Attr{Ino: node, Nlink: 1, Blksize: blockSize, Owner: gofuse.Owner{Uid: a.uid, Gid: a.gid}}
	out.SetTimes(&a.atime, &a.mtime, &a.ctime)
	if node != f.fileNode {
		out.Mode, out.Nlink = syscall.S_IFDIR|directoryMode(a.mode), 2
		return
	}
	out.Mode = syscall.S_IFREG | a.mode
	out.Size = uint64(f.size)
	out.Blocks = (uint64(f.size) + 511) / 512
}

// directoryMode lets in whoever may use the file.
func directoryMode(file uint32) uint32 {
	return 0o500 | (file&0o444)>>2 | file&0o444
}

func (f *fileSystem) knows(node uint64) bool { return node == rootNode || node == f.fileNode }

// Lookup finds the file in the directory.
func (f *fileSystem) Lookup(_ <-chan struct{}, h *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	if h.NodeId == f.fileNode {
		return gofuse.ENOTDIR
	}
	if name != f.name {
		return gofuse.ENOENT
	}
	out.NodeId = f.fileNode
	out.SetEntryTimeout(attrValid)
	out.SetAttrTimeout(attrValid)
	f.fillAttr(f.fileNode, &out.Attr)
	return gofuse.OK
}

// GetAttr describes a node.
func (f *fileSystem) GetAttr(_ <-chan struct{}, in *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	if !f.knows(in.NodeId) {
		return gofuse.ENOENT
	}
	out.SetTimeout(attrValid)
	f.fillAttr(in.NodeId, &out.Attr)
	return gofuse.OK
}

// SetAttr keeps permissions and times in memory and refuses to resize.
func (f *fileSystem) SetAttr(_ <-chan struct{}, in *gofuse.SetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	if in.NodeId != f.fileNode {
		return gofuse.EPERM
	}
	if f.readOnly {
		return gofuse.EROFS
	}
	if in.Valid&gofuse.FATTR_SIZE != 0 {
		switch {
		case in.Size > uint64(f.size):
			return gofuse.Status(syscall.EFBIG)
		case in.Size < uint64(f.size):
			return gofuse.EPERM
		}
	}
	f.attrs.set(in)
	out.SetTimeout(attrValid)
	f.fillAttr(in.NodeId, &out.Attr)
	return gofuse.OK
}

func (a *attributes) set(in *gofuse.SetAttrIn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if in.Valid&gofuse.FATTR_MODE != 0 {
		a.mode = in.Mode & 0o777
	}
	if in.Valid&gofuse.FATTR_UID != 0 {
		a.uid = in.Uid
	}
	if in.Valid&gofuse.FATTR_GID != 0 {
		a.gid = in.Gid
	}
	if in.Valid&gofuse.FATTR_ATIME != 0 {
		a.atime = time.Unix(int64(in.Atime), int64(in.Atimensec))
	}
	if in.Valid&gofuse.FATTR_ATIME_NOW != 0 {
		a.atime = now
	}
	if in.Valid&gofuse.FATTR_MTIME != 0 {
		a.mtime = time.Unix(int64(in.Mtime), int64(in.Mtimensec))
	}
	if in.Valid&gofuse.FATTR_MTIME_NOW != 0 {
		a.mtime = now
	}
	a.ctime = now
	if in.Valid&gofuse.FATTR_CTIME != 0 {
		a.ctime = time.Unix(int64(in.Ctime), int64(in.Ctimensec))
	}
}

// touch notes a write, where the kernel does not do that itself.
func (a *attributes) touch() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mtime = time.Now()
	a.ctime = a.mtime
}

// StatFs describes a full file system of the file's size.
func (f *fileSystem) StatFs(_ <-chan struct{}, _ *gofuse.InHeader, out *gofuse.StatfsOut) gofuse.Status {
	*out = gofuse.StatfsOut{
		Blocks: uint64((f.size-1)/blockSize + 1), Bsize: blockSize, Frsize: blockSize, Files: 1, NameLen: maxName,
	}
	if f.size == 0 {
		out.Blocks = 0
	}
	return gofuse.OK
}

// Access is not called: the mount has default_permissions.
func (f *fileSystem) Access(<-chan struct{}, *gofuse.AccessIn) gofuse.Status { return gofuse.OK }

// OpenDir lets the kernel cache the listing.
func (f *fileSystem) OpenDir(_ <-chan struct{}, _ *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	out.OpenFlags = gofuse.FOPEN_CACHE_DIR | gofuse.FOPEN_KEEP_CACHE
	return gofuse.OK
}

// ReadDir lists the directory.
func (f *fileSystem) ReadDir(_ <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	entries := []gofuse.DirEntry{
		{Name: ".", Ino: rootNode, Mode: syscall.S_IFDIR, Off: 1},
		{Name: "..", Ino: rootNode, Mode: syscall.S_IFDIR, Off: 2},
		{Name: f.name, Ino: childNode, Mode: syscall.S_IFREG, Off: 3},
	}
	if in.Offset >= uint64(len(entries)) {
		return gofuse.OK
	}
	for _, e := range entries[in.Offset:] {
		if !out.AddDirEntry(e) {
			break
		}
	}
	return gofuse.OK
}

// ReleaseDir has nothing to release.
func (f *fileSystem) ReleaseDir(*gofuse.ReleaseIn) {}

// FsyncDir has nothing to sync.
func (f *fileSystem) FsyncDir(<-chan struct{}, *gofuse.FsyncIn) gofuse.Status { return gofuse.OK }

// Forget has nothing to forget: nodes are numbers.
func (f *fileSystem) Forget(uint64, uint64) {}

// Create refuses: there is one file.
func (f *fileSystem) Create(<-chan struct{}, *gofuse.CreateIn, string, *gofuse.CreateOut) gofuse.Status {
	return gofuse.EPERM
}

// Mknod refuses: there is one file.
func (f *fileSystem) Mknod(<-chan struct{}, *gofuse.MknodIn, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EPERM
}

// Mkdir refuses: there is one file.
func (f *fileSystem) Mkdir(<-chan struct{}, *gofuse.MkdirIn, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EPERM
}

// Symlink refuses: there is one file.
func (f *fileSystem) Symlink(<-chan struct{}, *gofuse.InHeader, string, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EPERM
}

// Link refuses: there is one file.
func (f *fileSystem) Link(<-chan struct{}, *gofuse.LinkIn, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EPERM
}

// Unlink refuses: there is one file.
func (f *fileSystem) Unlink(<-chan struct{}, *gofuse.InHeader, string) gofuse.Status {
	return gofuse.EPERM
}

// Rmdir refuses: there is no directory.
func (f *fileSystem) Rmdir(<-chan struct{}, *gofuse.InHeader, string) gofuse.Status {
	return gofuse.EPERM
}

// Rename refuses: there is one file.
func (f *fileSystem) Rename(<-chan struct{}, *gofuse.RenameIn, string, string) gofuse.Status {
	return gofuse.EPERM
}

// Ioctl knows none.
func (f *fileSystem) Ioctl(<-chan struct{}, *gofuse.IoctlIn, []byte, *gofuse.IoctlOut, []byte) gofuse.Status {
	return gofuse.Status(syscall.ENOTTY)
}

// clamp returns how many of n bytes at off exist.
func (f *fileSystem) clamp(off, n uint64) int64 {
	if off >= uint64(f.size) {
		return 0
	}
	return int64(min(n, uint64(f.size)-off))
}

// Lseek answers SEEK_DATA and SEEK_HOLE (lseek(2)) from the extents.
func (f *fileSystem) Lseek(cancel <-chan struct{}, in *gofuse.LseekIn, out *gofuse.LseekOut) gofuse.Status {
	const seekData, seekHole = 3, 4
	if f.caps.Extenter == nil {
		return gofuse.ENOSYS // the kernel then takes the file for one run of data
	}
	if in.Whence != seekData && in.Whence != seekHole {
		return gofuse.EINVAL
	}
	if in.Offset >= uint64(f.size) {
		return gofuse.Status(syscall.ENXIO)
	}
	f.writeOutDirty()
	ctx := f.requestContext(cancel, &in.InHeader)
	defer ctx.finish()
	off, found, err := f.seek(ctx, int64(in.Offset), in.Whence == seekHole)
	switch {
	case err != nil:
		return toStatus(err)
	case !found && in.Whence == seekData:
		return gofuse.Status(syscall.ENXIO)
	}
	out.Offset = uint64(off)
	return gofuse.OK
}

// seek finds the first byte from off on that is in a hole, or in data.
func (f *fileSystem) seek(ctx context.Context, off int64, hole bool) (int64, bool, error) {
	for off < f.size {
		extents, err := f.caps.Extenter.Extents(ctx, off, f.size-off)
		if err != nil {
			return 0, false, err
		}
		if len(extents) == 0 {
			return 0, false, fmt.Errorf("no extents at %d: %w", off, memferry.ErrCorrupt)
		}
		for _, e := range extents {
			if (e.Flags&memferry.ExtentZero != 0) == hole {
				return max(off, e.Off), true, nil
			}
		}
		last := extents[len(extents)-1]
		if last.Off+last.Len <= off {
			return 0, false, fmt.Errorf("extents at %d lead nowhere: %w", off, memferry.ErrCorrupt)
		}
		off = last.Off + last.Len
	}
	return f.size, false, nil
}

// Fallocate modes (fallocate(2)).
const (
	fallocKeepSize  = 0x01
	fallocPunchHole = 0x02
	fallocZeroRange = 0x10
)

// Fallocate punches and zeroes. Allocation within the file needs nothing: its
// size is promised already.
func (f *fileSystem) Fallocate(cancel <-chan struct{}, in *gofuse.FallocateIn) gofuse.Status {
	if f.readOnly {
		return gofuse.EROFS
	}
	if in.Mode&^(fallocKeepSize|fallocPunchHole|fallocZeroRange) != 0 {
		return gofuse.Status(syscall.EOPNOTSUPP)
	}
	if in.Length == 0 || in.Offset > math.MaxInt64 || in.Length > math.MaxInt64 {
		return gofuse.EINVAL
	}
	n := f.clamp(in.Offset, in.Length)
	punch := in.Mode&fallocPunchHole != 0
	if n < int64(in.Length) && !punch {
		return gofuse.Status(syscall.ENOSPC) // it would grow, or have to hold what it can't
	}
	if in.Mode&(fallocPunchHole|fallocZeroRange) == 0 || n == 0 {
		return gofuse.OK
	}
	if f.caps.ZeroWriter == nil {
		// Trim alone won't do: what was trimmed may read as before.
		return gofuse.Status(syscall.EOPNOTSUPP)
	}
	flags := memferry.ZeroNoHole
	if punch {
		flags = 0
	}
	ctx := f.requestContext(cancel, &in.InHeader)
	defer ctx.finish()
	off := int64(in.Offset) // in is the library's again after the answer
	err := f.calls.call(ctx, func() error { return f.caps.ZeroWriter.WriteZeroes(off, n, flags) })
	f.noteWrite("write zeroes", err)
	return toStatus(err)
}

// Fsync syncs the backend. The kernel has written out what it cached before.
func (f *fileSystem) Fsync(cancel <-chan struct{}, in *gofuse.FsyncIn) gofuse.Status {
	if f.readOnly {
		return gofuse.OK
	}
	ctx := f.requestContext(cancel, &in.InHeader)
	defer ctx.finish()
	err := f.calls.call(ctx, f.backend.Sync)
	f.noteWrite("sync", err)
	return toStatus(err)
}

// Flush is needless: the kernel writes out its cache at close by itself. It
// asks once.
func (f *fileSystem) Flush(<-chan struct{}, *gofuse.FlushIn) gofuse.Status { return gofuse.ENOSYS }
