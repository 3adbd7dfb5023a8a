// Package mem is a backend in anonymous memory. It is sparse: a page takes
// memory from its first write until it is trimmed or zeroed as a whole, so a
// size far above that of the machine's memory costs nothing.
//
// The memory is one private mapping outside of the Go heap, and [Backend]
// hands out views of it, so a server can move data between a socket and the
// backend without a copy of its own.
//
// # Pages
//
// A bitmap tells which pages were written. Reads of the others never touch
// the mapping: even a read would fill page tables, which for a sparse
// terabyte take gigabytes. Bits are set before the bytes change, so a clear
// bit always means zeroes. They are set again afterwards, because a trim may
// have cleared them in between, and a page with a clear bit must hold no
// bytes that a later write would bring back to light. The same holds for a
// view for writing, but its end names no range; so where there was one
// meanwhile, Trim and WriteZeroes set again what they cleared. Such pages are shown as data
// although they hold zeroes.
//
// # Huge pages
//
// A huge page makes first writes two to four times as fast, but lets one
// written page take 2 MiB. So the mapping asks for none, whatever the system's
// default, except where a write of some length continues what was written
// before: in the huge page that follows one in use.
package mem

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"math"
	"math/bits"
	"os"
	"strconv"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/extent"
	"github.com/memferry/memferry/internal/gate"
	"github.com/memferry/memferry/internal/size"
)

// writers is the bit of Backend.views that a view for writing sets.
const writers = 1 << 62

// Backend is memory. Its methods never block, except Close.
type Backend struct {
	size     int64
	page     int64  // bytes that one bit of written stands for
	data     []byte // size rounded up to whole pages, aligned to hugeSize
	mapping  []byte // what data is part of
	bitmap   []byte // the mapping that written is part of
	written  []atomic.Uint64
	instance string
	changes  atomic.Uint64
	// views counts the views there are. The bit writers is set if one for
	// writing was handed out since there were none at all.
	views atomic.Int64
	// viewed counts the views for writing that were ever handed out.
	viewed atomic.Uint64
	huge   huge
	gate   gate.Gate
}

var (
	_ memferry.Backend      = (*Backend)(nil)
	_ memferry.Viewer       = (*Backend)(nil)
	_ memferry.Trimmer      = (*Backend)(nil)
	_ memferry.ZeroWriter   = (*Backend)(nil)
	_ memferry.Extenter     = (*Backend)(nil)
	_ memferry.Generationer = (*Backend)(nil)
)

// New returns a backend of n bytes, all zero.
func New(n int64) (*Backend, error) {
	if n < 0 || n > memferry.MaxSize {
		return nil, fmt.Errorf("mem: size %d: must be from 0 to %d", n, int64(memferry.MaxSize))
	}
	b := &Backend{size: n, page: max(memferry.PageSize, int64(os.Getpagesize()))}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	b.instance = hex.EncodeToString(id[:])
	if n == 0 {
		return b, nil
	}
	if err := b.reserve(); err != nil {
		return nil, fmt.Errorf("mem: reserve %s of address space: %w", size.Format(n), err)
	}
	return b, nil
}

// reserve maps the data and the bitmaps.
func (b *Backend) reserve() error {
	pages := (b.size-1)/b.page + 1
	words := (pages-1)/64 + 1
	b.huge.units = pages * b.page / hugeSize
	hugeWords := b.huge.units/64 + 1
	var err error
	if b.mapping, err = reserve(pages*b.page + hugeSize); err != nil {
		return err
	}
	if b.bitmap, err = reserve((words + hugeWords) * 8); err != nil {
		_ = unix.Munmap(b.mapping)
		return err
	}
	base := uintptr(unsafe.Pointer(unsafe.SliceData(b.mapping)))
	skip := int64(-base % hugeSize)
	b.data = b.mapping[skip : skip+pages*b.page : skip+pages*b.page]
	// Not supported is as good.
	_ = unix.Madvise(b.data, unix.MADV_NOHUGEPAGE)
	all := unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(b.bitmap))), words+hugeWords)
	b.written, b.huge.advised = all[:words], all[words:]
	return nil
}

// reserve maps n bytes that take memory page by page as they are written.
func reserve(n int64) ([]byte, error) {
	if n < 0 || n > math.MaxInt {
		return nil, unix.ENOMEM
	}
	return unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
}

// Size returns the size given to New.
func (b *Backend) Size() int64 { return b.size }

// Sync returns nil: memory has nothing to make durable.
func (b *Backend) Sync() error {
	if b.gate.Closed() {
		return closed("sync")
	}
	return nil
}

// Close waits until every view is released and every call has returned, and
// gives the memory back.
func (b *Backend) Close() error {
	if !b.gate.Shut() {
		<-b.gate.Idle()
		return nil
	}
	<-b.gate.Idle()
	if b.data == nil {
		return nil
	}
	// Only wrong arguments make munmap fail, and the fields stay as they are:
	// nobody passes the gate any more.
	if err := unix.Munmap(b.mapping); err != nil {
		return fmt.Errorf("mem: unmap: %w", err)
	}
	if err := unix.Munmap(b.bitmap); err != nil {
		return fmt.Errorf("mem: unmap: %w", err)
	}
	return nil
}

func closed(op string) error { return fmt.Errorf("mem: %s: %w", op, memferry.ErrClosed) }

// enter checks a range and keeps the memory mapped until leave.
func (b *Backend) enter(op string, off, n int64) error {
	if !b.gate.Enter() {
		return closed(op)
	}
	if err := memferry.CheckRange(op, off, n, b.size); err != nil {
		b.gate.Leave()
		return fmt.Errorf("mem: %w", err)
	}
	return nil
}

// ReadAt copies from memory; the bytes of unwritten pages are cleared without
// touching it.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	if !b.gate.Enter() {
		return 0, closed("read")
	}
	defer b.gate.Leave()
	n, err := memferry.CheckRead(off, len(p), b.size)
	for p = p[:n]; len(p) > 0; {
		run, data := b.run(off, int64(len(p)))
		if data {
			copy(p[:run], b.data[off:])
		} else {
			clear(p[:run])
		}
		p, off = p[run:], off+run
	}
	return n, err
}

// run returns how many of the n > 0 bytes at off, from the first on, are of
// its kind: data or unwritten.
func (b *Backend) run(off, n int64) (length int64, data bool) {
	first, last := off/b.page, (off+n-1)/b.page
	data = b.written[first/64].Load()>>(first%64)&1 == 1
	for i := first; ; {
		w := b.written[i/64].Load() >> (i % 64)
		if data {
			w = ^w
		}
		// w has ones where the run ends; those shifted in are not of this
		// word.
		left := 64 - i%64
		same := min(int64(bits.TrailingZeros64(w)), left)
		i += same
		if i > last {
			return n, data
		}
		if same < left {
			return i*b.page - off, data
		}
	}
}

// WriteAt copies to memory.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	if err := b.enter("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	defer b.gate.Leave()
	if len(p) == 0 {
		return 0, nil
	}
	b.changes.Add(1)
	first, end := off/b.page, (off+int64(len(p))-1)/b.page+1
	b.advise(off, int64(len(p)))
	b.mark(first, end)
	copy(b.data[off:], p)
	b.mark(first, end)
	b.changes.Add(1)
	return len(p), nil
}

// mark sets the bits of pages [first, end).
func (b *Backend) mark(first, end int64) {
	for first < end {
		mask, next := maskOf(first, end)
		if w := &b.written[first/64]; w.Load()&mask != mask {
			w.Or(mask)
		}
		first = next
	}
}

// maskOf returns the bits of pages [first, end) in the word of first, and the
// first page after that.
func maskOf(first, end int64) (mask uint64, next int64) {
	next = min(end, (first|63)+1)
	return ^uint64(0) >> (64 - (next - first)) << (first % 64), next
}

// Trim gives back the whole pages in the range. It reads as zero afterwards,
// and so do the bytes before and after those pages.
func (b *Backend) Trim(off, n int64) error { return b.zero("trim", off, n, false) }

// WriteZeroes gives back the whole pages in the range, unless they shall stay
// allocated.
func (b *Backend) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	if flags == memferry.ZeroNoHole|memferry.ZeroFast {
		return fmt.Errorf("mem: fast zeroing of allocated pages: %w", memferry.ErrNotSupported)
	}
	return b.zero("write zeroes", off, n, flags&memferry.ZeroNoHole != 0)
}

func (b *Backend) zero(op string, off, n int64, allocate bool) error {
	if err := b.enter(op, off, n); err != nil {
		return err
	}
	defer b.gate.Leave()
	if n == 0 {
		return nil
	}
	b.changes.Add(1)
	defer b.changes.Add(1)
	end := off + n
	if allocate {
		first, last := off/b.page, (end-1)/b.page+1
		b.advise(off, n)
		b.mark(first, last)
		clear(b.data[off:end])
		b.mark(first, last)
		return nil
	}
	first, last := (off+b.page-1)/b.page, end/b.page
	if end == b.size { // what follows in the last page is nobody's
		last = int64(len(b.data)) / b.page
	}
	if first >= last {
		b.clear(off, end)
		return nil
	}
	b.clear(off, first*b.page)
	b.clear(last*b.page, end)
	return b.free(first, last)
}

// clear zeroes the bytes [off, end) in the pages that were written.
func (b *Backend) clear(off, end int64) {
	for off < end {
		n, data := b.run(off, end-off)
		if data {
			clear(b.data[off : off+n])
		}
		off += n
	}
}

// free zeroes the pages [first, end) and gives their memory back.
func (b *Backend) free(first, end int64) error {
	for first < end {
		n, data := b.run(first*b.page, (end-first)*b.page)
		next := first + (n+b.page-1)/b.page
		if data {
			if err := b.freeRun(first, next); err != nil {
				return err
			}
		}
		first = next
	}
	return nil
}

func (b *Backend) freeRun(first, end int64) error {
	viewed := b.viewed.Load()
	writing := b.views.Load() >= writers
	for i := first; i < end; {
		mask, next := maskOf(i, end)
		b.written[i/64].And(^mask)
		i = next
	}
	// Private anonymous pages read as zero after this (madvise(2)).
	err := unix.Madvise(b.data[first*b.page:end*b.page], unix.MADV_DONTNEED)
	if err != nil {
		b.mark(first, end)
		return fmt.Errorf("mem: give back %d bytes at %d: %w", (end-first)*b.page, first*b.page, err)
	}
	// A view for writing that began before the bits were cleared may store
	// bytes until after they were, and even be released by now. One that
	// begins later counts itself before it sets its bits again.
	if writing || b.viewed.Load() != viewed {
		b.mark(first, end)
	}
	return nil
}

// Extents tells written pages from others.
func (b *Backend) Extents(_ context.Context, off, n int64) ([]memferry.Extent, error) {
	if err := b.enter("extents", off, n); err != nil {
		return nil, err
	}
	defer b.gate.Leave()
	if n == 0 {
		return nil, fmt.Errorf("mem: extents of 0 bytes at %d: %w", off, memferry.ErrOutOfRange)
	}
	end := off + n
	l := extent.New(off, end)
	for l.Next() < end && len(l.Extents) < memferry.MaxExtents {
		run, data := b.run(l.Next(), end-l.Next())
		flags := extent.Hole
		if data {
			flags = 0
		}
		l.Add(l.Next()+run, flags) // joins: bits may change between two calls of run
	}
	return l.Extents, nil
}

// Generation returns a tag of this object and the number of its changes.
func (b *Backend) Generation(context.Context) (string, error) {
	if b.gate.Closed() {
		return "", closed("generation")
	}
	return b.instance + "-" + strconv.FormatUint(b.changes.Load(), 10), nil
}

// View returns the memory itself. Unlike ReadAt, looking at unwritten pages
// through it fills page tables.
func (b *Backend) View(off, n int64) ([]byte, error) {
	if err := b.enter("view", off, n); err != nil {
		return nil, err
	}
	b.views.Add(1)
	return b.data[off : off+n : off+n], nil
}

// ViewForWrite returns the memory itself, and counts its pages as written.
func (b *Backend) ViewForWrite(off, n int64) ([]byte, error) {
	if err := b.enter("view", off, n); err != nil {
		return nil, err
	}
	b.views.Add(1)
	b.views.Or(writers)
	b.viewed.Add(1)
	b.changes.Add(1)
	if n > 0 {
		b.advise(off, n)
		b.mark(off/b.page, (off+n-1)/b.page+1)
	}
	return b.data[off : off+n : off+n], nil
}

// ReleaseView ends the use of a view.
func (b *Backend) ReleaseView() {
	for {
		v := b.views.Load()
		next := v - 1
		if v >= writers {
			// It may have been one for writing: what was stored through it
			// since it was handed out is a change as well.
			b.changes.Add(1)
			if next == writers {
				next = 0
			}
		}
		if b.views.CompareAndSwap(v, next) {
			break
		}
	}
	b.gate.Leave()
}
