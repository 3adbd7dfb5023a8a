package uffd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/sys/uffd"
	"github.com/memferry/memferry/region"
)

// pageState is what a landing knows of a page. It grows, until Drop.
type pageState = uint32

const (
	pageAbsent   pageState = iota
	pagePoisoned           // absent, and whoever touches it is told so
	pageZero               // known to be zero; it takes no memory yet
	pageShowing            // as landed, but not, or only just, in the application's page tables
	pageLanded             // the memory has it: only the application changes it
)

// arrived tells that the memory has the bytes, and only the application
// changes them.
func arrived(s pageState) bool { return s >= pageShowing }

// landing is the local backend of the region: it puts what arrives into the
// memory, and shows it to the application. What has landed is never written
// again, whatever the region says: from then on the memory itself is the truth.
type landing struct {
	fd   *uffd.FD
	base uintptr // of the application's mapping
	fill []byte  // our mapping of the same file
	size int64
	// protect arms the tracking of writes as pages arrive.
	protect uffd.Flags

	locks [64]sync.Mutex // by block of hugeSize; guards changes of state
	// state is in memory that outlives the process that serves: whoever comes
	// after it knows what has landed.
	state []atomic.Uint32
	// zap has the owner take pages out of its page tables, and tell which of them
	// must stay; nil where they all must.
	zap func(ctx context.Context, page, n int64) ([]region.Run, error)
	// tables are the owner's page tables; nil where writes aren't tracked.
	tables *uffd.Scanner
}

// wasProtected tells whether a page that isn't mapped was not written to before
// it went.
func (l *landing) wasProtected(page int64) uffd.Flags {
	if l.tables == nil {
		return 0
	}
	var f uffd.Flags
	err := l.tables.Protected(l.addr(page), l.addr(page+1), func(uffd.Run) error { f = l.protect; return nil })
	if err != nil {
		return 0 // so it counts as written
	}
	return f
}

// stateSize returns how much memory the states of n bytes take.
func stateSize(n int64) int64 { return roundUp(roundUp(n) / pageSize * 4) }

func newLanding(fd *uffd.FD, base uintptr, fill, state []byte, size int64) *landing {
	l := &landing{fd: fd, base: base, fill: fill, size: size}
	l.state = states(state, int64(len(fill))/pageSize)
	if fd.Features()&uffd.FeatureWPAsync != 0 {
		l.protect = uffd.Protect
	}
	return l
}

func states(p []byte, pages int64) []atomic.Uint32 {
	return unsafe.Slice((*atomic.Uint32)(unsafe.Pointer(unsafe.SliceData(p))), pages)
}

func (l *landing) Size() int64  { return l.size }
func (l *landing) Sync() error  { return nil }
func (l *landing) Close() error { return nil } // the memory is not ours

// ReadAt reads what has landed, or is zero.
func (l *landing) ReadAt(p []byte, off int64) (int, error) {
	n, eof := memferry.CheckRead(off, len(p), l.size)
	for done := 0; done < n; {
		at := off + int64(done)
		q := p[done:min(n, done+int(pageSize-at%pageSize))]
		switch l.state[at/pageSize].Load() {
		case pageShowing, pageLanded:
			copy(q, l.fill[at:])
		case pageZero:
			clear(q)
		default:
			return done, fmt.Errorf("read of the page at %d: it has not arrived", at)
		}
		done += len(q)
	}
	return n, eof
}

// WriteAt lands whole pages; the last one of the memory may be shorter.
func (l *landing) WriteAt(p []byte, off int64) (int, error) {
	if err := l.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	for done := 0; done < len(p); {
		at := off + int64(done)
		q := p[done:min(len(p), done+int(hugeSize-at%hugeSize))]
		if err := l.landBlock(q, at); err != nil {
			return done, err
		}
		done += len(q)
	}
	return len(p), nil
}

// WriteZeroes notes that pages are zero. They land when they are touched.
func (l *landing) WriteZeroes(off, n int64, _ memferry.ZeroFlags) error {
	if err := l.check(off, n); err != nil {
		return err
	}
	for at, end := off, off+n; at < end; {
		next := min(end, (at/hugeSize+1)*hugeSize)
		if err := l.noteZero(at/pageSize, (next+pageSize-1)/pageSize); err != nil {
			return err
		}
		at = next
	}
	return nil
}

// noteZero does so within one block of hugeSize.
func (l *landing) noteZero(page, end int64) error {
	mu := l.lock(page * pageSize)
	defer mu.Unlock()
	for ; page < end; page++ {
		switch l.state[page].Load() {
		case pageAbsent:
			l.state[page].Store(pageZero)
		case pagePoisoned: // somebody wanted it
			if err := l.heal(nil, page, page+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// check: part of a page could land only once.
func (l *landing) check(off, n int64) error {
	if err := memferry.CheckRange("land", off, n, l.size); err != nil {
		return err
	}
	if end := off + n; off%pageSize != 0 || end%pageSize != 0 && end != l.size {
		// What has landed already needs no writing.
		for page := off / pageSize; page*pageSize < end; page++ {
			if !arrived(l.state[page].Load()) {
				return fmt.Errorf("land %d bytes at %d: part of a page: %w", n, off, memferry.ErrNotSupported)
			}
		}
	}
	return nil
}

// landBlock lands pages of one block of hugeSize.
func (l *landing) landBlock(p []byte, off int64) error {
	mu := l.lock(off)
	defer mu.Unlock()
	first, last := off/pageSize, (off+int64(len(p))+pageSize-1)/pageSize
	for page := first; page < last; {
		was := l.state[page].Load()
		end := page + 1
		for end < last && l.state[end].Load() == was {
			end++
		}
		at := page * pageSize
		q := p[at-off : min(int64(len(p)), end*pageSize-off)]
		var err error
		switch was {
		case pageShowing, pageLanded:
		case pagePoisoned:
			err = l.heal(q, page, end)
		default:
			copy(l.fill[at:], q)
			err = l.show(page, end)
		}
		if err != nil {
			return err
		}
		page = end
	}
	return nil
}

// landZero lands the zero pages around one that is wanted: as many as are
// known to be zero, within one huge page.
func (l *landing) landZero(page int64) error {
	mu := l.lock(page * pageSize)
	defer mu.Unlock()
	if l.state[page].Load() != pageZero {
		return nil
	}
	const pages = hugeSize / pageSize
	first, end := page, page+1
	for first%pages != 0 && l.state[first-1].Load() == pageZero {
		first--
	}
	for end%pages != 0 && end < int64(len(l.state)) && l.state[end].Load() == pageZero {
		end++
	}
	// Touching a hole of the file fills it with zeroes.
	if err := unix.Madvise(l.fill[first*pageSize:end*pageSize], unix.MADV_POPULATE_WRITE); err != nil {
		return fmt.Errorf("make zero pages: %w", err)
	}
	return l.show(first, end)
}

// show maps pages [page, end), which the file has now, for the application,
// and wakes who waits for them.
func (l *landing) show(page, end int64) error {
	l.mark(page, end, pageShowing)
	if err := l.remap(page, end, l.protect); err != nil {
		return err
	}
	l.mark(page, end, pageLanded)
	return nil
}

func (l *landing) mark(page, end int64, s pageState) {
	for ; page < end; page++ {
		l.state[page].Store(s)
	}
}

// reshow shows a page again that has arrived.
func (l *landing) reshow(page int64) error {
	mu := l.lock(page * pageSize)
	defer mu.Unlock()
	was := l.state[page].Load()
	if !arrived(was) {
		return errDropped
	}
	err := l.remap(page, page+1, l.wasProtected(page))
	if was == pageShowing { // whoever showed it died on the way
		switch {
		case err == nil:
			l.state[page].Store(pageLanded)
		case errors.Is(err, unix.EFAULT): // or healed it: the bytes are not there
			l.state[page].Store(pageAbsent)
		}
	}
	return err
}

// remap maps pages that have landed. Some may be mapped already.
func (l *landing) remap(page, end int64, flags uffd.Flags) error {
	for page < end {
		n, err := l.fd.Continue(l.addr(page), uintptr(end-page)*pageSize, flags)
		page += int64(n) / pageSize
		switch {
		case err == nil:
		case errors.Is(err, unix.EEXIST):
			if err := l.fd.Wake(l.addr(page), pageSize); err != nil {
				return err
			}
			page++
		case errors.Is(err, unix.EAGAIN): // the address space is being changed
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL):
			// The application has unmapped it, in whole or in part.
			if end-page == 1 {
				return nil
			}
			middle := page + (end-page)/2
			if err := l.remap(page, middle, flags); err != nil {
				return err
			}
			page = middle
		default:
			return err
		}
	}
	return nil
}

// heal replaces poisoned pages; a nil p stands for zeroes.
func (l *landing) heal(p []byte, page, end int64) error {
	var b [pageSize]byte
	for ; page < end; page++ {
		n := copy(b[:], p)
		p = p[n:]
		clear(b[n:])
		l.state[page].Store(pageShowing) // before it can be written to: see tracker.note
		_, err := l.fd.Copy(l.addr(page), b[:], l.protect)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			l.state[page].Store(pagePoisoned)
			return err
		}
		l.state[page].Store(pageLanded)
	}
	return nil
}

// poison makes an absent page fail for who touches it.
func (l *landing) poison(page int64) error {
	mu := l.lock(page * pageSize)
	defer mu.Unlock()
	if s := l.state[page].Load(); s != pageAbsent && s != pagePoisoned {
		return nil // it arrived meanwhile; the thread tries again
	}
	_, err := l.fd.Poison(l.addr(page), pageSize, 0)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	l.state[page].Store(pagePoisoned)
	return l.fd.Wake(l.addr(page), pageSize)
}

func (l *landing) lock(off int64) *sync.Mutex {
	mu := &l.locks[off/hugeSize%int64(len(l.locks))]
	mu.Lock()
	return mu
}

func (l *landing) addr(page int64) uintptr { return l.base + uintptr(page)*pageSize }
