package uffd

import (
	"fmt"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/sys/uffd"
)

// Bitmap has a bit for each page of the memory, the first in the lowest bit of
// the first word.
type Bitmap []uint64

// Has reports whether the bit of a page is set.
func (b Bitmap) Has(page int64) bool { return b[page/64]&(1<<(page%64)) != 0 }

// Count returns how many are set.
func (b Bitmap) Count() (n int64) {
	for _, w := range b {
		n += int64(bits.OnesCount64(w))
	}
	return n
}

// Runs passes every run of set bits to fn, in ascending order, until it fails.
func (b Bitmap) Runs(fn func(page, n int64) error) error {
	total := int64(len(b)) * 64
	for page := b.next(0, true); page < total; {
		end := b.next(page, false)
		if err := fn(page, end-page); err != nil {
			return err
		}
		page = b.next(end, true)
	}
	return nil
}

// next returns the first page from page on whose bit is set, or clear.
func (b Bitmap) next(page int64, set bool) int64 {
	for ; page < int64(len(b))*64; page = (page/64 + 1) * 64 {
		w := b[page/64]
		if !set {
			w = ^w
		}
		if w >>= page % 64; w != 0 {
			return page + int64(bits.TrailingZeros64(w))
		}
	}
	return int64(len(b)) * 64
}

func (b Bitmap) set(page, n int64) {
	for end := page + n; page < end; page++ {
		b[page/64] |= 1 << (page % 64)
	}
}

// tracker finds out what was written. Two ask, each for what is new to them:
// the application through Dirty, and Sync.
type tracker struct {
	scanner *uffd.Scanner
	data    []byte
	states  []atomic.Uint32 // of the pages; see landing

	mu      sync.Mutex
	dirty   Bitmap // not yet told to the application
	unsaved Bitmap // not yet given to the region
}

func newTracker(data []byte, states []atomic.Uint32) (*tracker, error) {
	s, err := uffd.OpenScanner(os.Getpid())
	if err != nil {
		return nil, err
	}
	t := &tracker{scanner: s, data: data, states: states}
	t.dirty, t.unsaved = t.empty(), t.empty()
	return t, nil
}

func (t *tracker) close() error { return t.scanner.Close() }

func (t *tracker) empty() Bitmap { return make(Bitmap, (len(t.data)/pageSize+63)/64) }

// take empties one of the two bitmaps, after a look at what is new.
func (t *tracker) take(which *Bitmap) (Bitmap, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.look(t.data, 0); err != nil {
		return nil, err // what was seen stays noted
	}
	taken := *which
	*which = t.empty()
	return taken, nil
}

// look notes what was written to in p, which begins at a page. It looks at
// what has arrived alone: elsewhere it would leave markers in the way of what
// comes.
func (t *tracker) look(p []byte, page int64) error {
	end := page + int64(len(p))/pageSize
	base := address(t.data)
	for at := t.next(page, end, true); at < end; {
		stop := t.next(at, end, false)
		err := t.scanner.WrittenOrGone(base+uintptr(at)*pageSize, base+uintptr(stop)*pageSize, func(r uffd.Run) error {
			for a := r.Start; a < r.End; a += pageSize {
				t.note(int64(a-uint64(base))/pageSize, r.Categories&uffd.PagePresent != 0)
			}
			return nil
		})
		if err != nil {
			return err
		}
		at = t.next(stop, end, true)
	}
	return nil
}

// next returns the first page from page on that has arrived, or has not; at most
// end.
func (t *tracker) next(page, end int64, is bool) int64 {
	for page < end && arrived(t.states[page].Load()) != is {
		page++
	}
	return page
}

// note takes a page for written. One that is just being shown is, if it is
// present; otherwise nobody can have seen it, though it looks to the kernel as
// if it were written to, as poison does.
func (t *tracker) note(page int64, present bool) {
	s := t.states[page].Load()
	if s == pageLanded || s == pageShowing && present {
		t.dirty.set(page, 1)
		t.unsaved.set(page, 1)
	}
}

// putBack notes again what may not have reached the source.
func (t *tracker) putBack(b Bitmap) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, w := range b {
		t.unsaved[i] |= w
	}
}

// Dirty returns the pages that were written to since the last call of Dirty,
// or since Open: at least those, and few others. Looking and forgetting are one
// step, so no write is ever missed: what is written afterwards is in the next
// answer. It doesn't stop writers. Data that arrives from the source does not
// count as written.
//
// It needs Linux 6.7; it is memferry.ErrNotSupported elsewhere, and in memory
// that is read-only.
func (m *Memory) Dirty() (Bitmap, error) {
	if err := m.enterTracked("dirty"); err != nil {
		return nil, err
	}
	defer m.gate.Leave()
	b, err := m.tracker.take(&m.tracker.dirty)
	if err != nil {
		return nil, fmt.Errorf("uffd: dirty: %w", err)
	}
	return b, nil
}

func (m *Memory) enterTracked(op string) error {
	if m.tracker == nil {
		err := canTrack()
		if err == nil { // so it is read-only
			err = memferry.ErrNotSupported
		}
		return fmt.Errorf("uffd: %s: writes are not tracked: %w", op, err)
	}
	if !m.gate.Enter() {
		return fmt.Errorf("uffd: %s: %w", op, memferry.ErrClosed)
	}
	return nil
}

// Sync hands every page that was written to before the call to the source and
// returns once the source has it for good. It doesn't stop writers: of a page
// that is being written to, the source gets a mixture, and the next Sync gives
// it the rest. Where writes can't be tracked it is memferry.ErrNotSupported, and
// memferry.ErrReadOnly where the source can't be written to; in memory that was
// opened read-only it does nothing.
func (m *Memory) Sync() error {
	if m.o.ReadOnly {
		return nil
	}
	if err := m.enterTracked("sync"); err != nil {
		return err
	}
	defer m.gate.Leave()
	m.syncing.Lock()
	defer m.syncing.Unlock()
	if err := m.handOver(true); err != nil {
		return fmt.Errorf("uffd: sync: %w", err)
	}
	return nil
}

// handOver gives the source what was written, also if that is nothing. One at a
// time may do it.
func (m *Memory) handOver(nothing bool) error {
	b, err := m.tracker.take(&m.tracker.unsaved)
	if err != nil {
		return err
	}
	if !nothing && b.Count() == 0 {
		return nil
	}
	if err := m.engine.sync(b); err != nil {
		m.tracker.putBack(b) // whoever knew of it may be gone
		return err
	}
	return nil
}
