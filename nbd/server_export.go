package nbd

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/memferry/memferry"
	"golang.org/x/sys/unix"
)

// Export is a backend under a name.
type Export struct {
	// Name is what clients ask for. It must be UTF-8 without NUL. The empty
	// name is the default export; without one of that name, the first added.
	Name string
	// Description is shown to people who list the exports.
	Description string
	// Backend is served. The server does not close it.
	Backend memferry.Backend
	// ReadOnly refuses writes to a backend that would take them.
	ReadOnly bool
}

// access says how much of a read or write may be served by the goroutine that
// reads a connection, with nobody else to read what is sent meanwhile.
type access uint8

const (
	// accessSlow: the backend may block, so never.
	accessSlow access = iota
	// accessFile: a file on a disk, so a read of what is in the page cache,
	// and a write while nothing else is waiting.
	accessFile
	// accessMemory: always.
	accessMemory
)

// export is an Export with what was found out about its backend.
type export struct {
	Export
	order int64 // of being added to the server
	// instance names this export until it is removed or the process ends.
	instance string

	caps  memferry.Capabilities
	size  int64
	flags TransmissionFlags // without those that depend on the connection
	sizes blockSizes

	access access
	file   syscall.RawConn // of a Filer
	// noSplice is set once its pages could not be taken by reference.
	noSplice atomic.Bool

	syncs syncGroup
}

func newExport(e Export, maxRequest int) (*export, error) {
	if err := checkString("export name", e.Name); err != nil {
		return nil, err
	}
	if err := checkString("export description", e.Description); err != nil {
		return nil, err
	}
	if e.Backend == nil {
		return nil, errors.New("no backend")
	}
	x := &export{Export: e, instance: newSession(), caps: memferry.CapabilitiesOf(e.Backend), size: e.Backend.Size()}
	x.syncs.sync = e.Backend.Sync
	x.ReadOnly = e.ReadOnly || x.caps.ReadOnly
	if err := x.findSizes(maxRequest); err != nil {
		return nil, err
	}
	x.findFlags()
	x.findAccess()
	return x, nil
}

// findFlags advertises what the backend can do and nothing else.
//
// CAN_MULTI_CONN promises that a FLUSH on one connection covers the writes
// acknowledged on all of them, and that all of them see the same data. Every
// connection to an export uses the same Backend object, and a Backend's Sync
// covers every write that was acknowledged before the call, whoever made it;
// the server itself keeps no data back. So the promise holds for any backend.
func (x *export) findFlags() {
	x.flags = FlagHasFlags | FlagCanMultiConn
	if x.caps.Viewer != nil || x.caps.Filer != nil {
		x.flags |= FlagSendCache
	}
	if x.ReadOnly {
		x.flags |= FlagReadOnly
		return
	}
	x.flags |= FlagSendFlush | FlagSendFUA
	if x.caps.Trimmer != nil {
		x.flags |= FlagSendTrim
	}
	if x.caps.ZeroWriter != nil {
		x.flags |= FlagSendWriteZeroes | FlagSendFastZero
	}
}

// findSizes turns the backend's constraints into the protocol's.
func (x *export) findSizes(maxRequest int) error {
	c := x.caps.BlockSizes
	minimum := max(c.Min, 1)
	if minimum > maxMinBlock || bits.OnesCount64(uint64(minimum)) != 1 {
		return fmt.Errorf("block size %d of the backend: NBD takes powers of two up to %d", minimum, maxMinBlock)
	}
	if x.size < 0 || x.size%minimum != 0 {
		return fmt.Errorf("size %d of the backend is not a multiple of its block size %d", x.size, minimum)
	}
	maximum := int64(maxRequest)
	if c.Max > 0 {
		maximum = min(maximum, c.Max)
	}
	preferred := max(c.Preferred, memferry.PageSize, minimum)
	preferred = 1 << (bits.Len64(uint64(preferred)) - 1)
	for preferred > maximum && preferred > max(minimum, 512) {
		preferred /= 2
	}
	x.sizes = blockSizes{uint32(minimum), uint32(preferred), uint32(max(maximum, preferred))}
	return nil
}

func (x *export) findAccess() {
	if x.caps.Filer != nil {
		if f := x.caps.Filer.File(); f != nil {
			if raw, err := f.SyscallConn(); err == nil {
				x.file = raw
				x.access = accessFile
			}
		}
	}
	if x.caps.Viewer != nil || x.file != nil && isMemoryFile(x.file) {
		x.access = accessMemory
	}
}

// isMemoryFile reports whether a file never waits for a disk.
func isMemoryFile(raw syscall.RawConn) bool {
	var st unix.Statfs_t
	err := errors.New("not called")
	if cerr := raw.Control(func(fd uintptr) { err = unix.Fstatfs(int(fd), &st) }); cerr != nil {
		return false
	}
	return err == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC || st.Type == unix.HUGETLBFS_MAGIC)
}

// readCached fills p from the page cache. False means that it would have had
// to wait, or cannot tell.
func (x *export) readCached(p []byte, off int64) bool {
	n := 0
	err := os.ErrInvalid
	cerr := x.file.Control(func(fd uintptr) {
		n, err = unix.Preadv2(int(fd), [][]byte{p}, off, unix.RWF_NOWAIT)
	})
	return cerr == nil && err == nil && n == len(p)
}

// hole reports whether the range is known, at little cost, to read as zero.
func (x *export) hole(ctx context.Context, off, n int64) bool {
	if x.file != nil {
		return x.fileHole(off, n)
	}
	if x.caps.Extenter == nil || x.access == accessSlow {
		return false
	}
	e, err := x.caps.Extenter.Extents(ctx, off, n)
	return err == nil && allZero(e, off, n)
}

// fileHole asks where the next data is, lseek(2). To ask for the extents would
// have tmpfs walk all pages up to the next hole.
func (x *export) fileHole(off, n int64) bool {
	hole := false
	cerr := x.file.Control(func(fd uintptr) {
		data, err := unix.Seek(int(fd), off, unix.SEEK_DATA)
		hole = errors.Is(err, unix.ENXIO) || err == nil && data >= off+n
	})
	return cerr == nil && hole
}

// allZero reports whether e covers the range with zeroes.
func allZero(e []memferry.Extent, off, n int64) bool {
	end := off
	for _, x := range e {
		if x.Off != end || x.Flags&memferry.ExtentZero == 0 {
			return false
		}
		end += x.Len
	}
	return end >= off+n
}

// cache asks for the range to be fetched into memory.
func (x *export) cache(off, n int64) error {
	if x.caps.Viewer != nil || x.file == nil {
		return nil
	}
	var err error
	if cerr := x.file.Control(func(fd uintptr) {
		err = unix.Fadvise(int(fd), off, n, unix.FADV_WILLNEED)
	}); cerr != nil {
		return cerr
	}
	return err
}

func (x *export) readAt(ctx context.Context, p []byte, off int64) error {
	var n int
	var err error
	if r := x.caps.ContextReader; r != nil {
		n, err = r.ReadAtContext(ctx, p, off)
	} else {
		n, err = x.Backend.ReadAt(p, off)
	}
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("backend read %d of %d bytes", n, len(p))
	}
	return err
}

func (x *export) writeAt(ctx context.Context, p []byte, off int64) error {
	if w := x.caps.ContextWriter; w != nil {
		_, err := w.WriteAtContext(ctx, p, off)
		return err
	}
	_, err := x.Backend.WriteAt(p, off)
	return err
}

// syncGroup lets requests that want a Sync at the same time share one. A Sync
// covers what was acknowledged before it began, so a request may join one that
// is yet to begin, not one that is running.
type syncGroup struct {
	sync func() error

	mu      sync.Mutex
	running bool
	next    *syncCall
}

type syncCall struct {
	done chan struct{}
	err  error // valid once done is closed
}

// do returns once a Sync that began after the call has ended.
func (g *syncGroup) do() error {
	g.mu.Lock()
	if g.running {
		call := g.next
		if call == nil {
			call = &syncCall{done: make(chan struct{})}
			g.next = call
		}
		g.mu.Unlock()
		<-call.done
		return call.err
	}
	g.running = true
	g.mu.Unlock()
	err := g.sync()
	g.mu.Lock()
	call := g.next
	g.next = nil
	g.running = call != nil
	g.mu.Unlock()
	if call != nil {
		go g.lead(call)
	}
	return err
}

// lead runs the Sync that call waits for, and those that were asked for since.
func (g *syncGroup) lead(call *syncCall) {
	for call != nil {
		call.err = g.sync()
		close(call.done)
		g.mu.Lock()
		call = g.next
		g.next = nil
		g.running = call != nil
		g.mu.Unlock()
	}
}
