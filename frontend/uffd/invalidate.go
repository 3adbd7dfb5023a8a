package uffd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/sys/uffd"
	"github.com/memferry/memferry/region"
)

const (
	// zapPatience is how long the server waits at first for the owner to take
	// pages out of its page tables. Faults wait meanwhile, and if they are those of
	// all the owner's Ps, nobody is left to do it: then they have to go on first.
	// On a machine that is busy the owner is only slow: each attempt waits twice
	// as long as the one before, up to maxZapPatience.
	zapPatience    = 20 * time.Millisecond
	maxZapPatience = 640 * time.Millisecond
	// zapAttempts bounds how often that is tried: half a minute.
	zapAttempts = 30
)

// errZapLate is why an attempt to drop pages was given up.
var errZapLate = fmt.Errorf("the memory is in use by all threads of the program: %w", memferry.ErrTimeout)

// errDropped is about a page that became absent while it was being shown.
var errDropped = errors.New("the page was dropped")

// Invalidate drops the pages that hold any of n bytes at off, so that the next
// touch fetches them again: whoever touches them after it has returned sees what
// the source holds then. What was written to them is handed to the source
// first, as Sync does; a page that is written to meanwhile stays, as the newer
// one. It can be called while others use the bytes. See region.Region.Invalidate
// for sources that tell generations.
func (m *Memory) Invalidate(ctx context.Context, off, n int64) error {
	if err := memferry.CheckRange("invalidate", off, n, m.size); err != nil {
		return fmt.Errorf("uffd: %w", err)
	}
	if !m.gate.Enter() {
		return fmt.Errorf("uffd: invalidate: %w", memferry.ErrClosed)
	}
	defer m.gate.Leave()
	// No Sync may be under way: it knows of writes that nobody else does.
	m.syncing.Lock()
	defer m.syncing.Unlock()
	if m.tracker != nil && !m.engine.readOnly() {
		if err := m.handOver(false); err != nil {
			return fmt.Errorf("uffd: invalidate: %w", err)
		}
	}
	if err := m.engine.invalidate(ctx, off, n); err != nil {
		return fmt.Errorf("uffd: %w", err)
	}
	return nil
}

// invalidate drops pages, and tries again where the owner was not in time.
func (l *local) invalidate(ctx context.Context, off, n int64) error {
	if l.region == nil {
		return errNoSource
	}
	patience := zapPatience
	for attempt := 1; ; attempt++ {
		l.patience.Store(int64(patience))
		err := l.region.Invalidate(ctx, off, n)
		if !errors.Is(err, errZapLate) || attempt == zapAttempts {
			return err
		}
		select {
		case <-time.After(patience):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		patience = min(2*patience, maxZapPatience)
	}
}

// zap takes pages out of the application's page tables, and returns those that
// were written to and have not been handed over. The server keeps their faults
// waiting: what zap finds out stays true until it lets go.
func (m *Memory) zap(_ context.Context, page, n int64) ([]region.Run, error) {
	end := time.Now().Add(zapPatience)
	for !m.moving.TryLock() { // somebody copies, which a fault could hold up
		if time.Now().After(end) {
			return nil, errZapLate
		}
		time.Sleep(20 * time.Microsecond)
	}
	defer m.moving.Unlock()
	m.drops.Add(1)
	p := m.app.data[page*pageSize : (page+n)*pageSize]
	if m.tracker == nil {
		return nil, zapPages(p)
	}
	return m.tracker.zap(p, page)
}

func zapPages(p []byte) error {
	if err := unix.Madvise(p, unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("take pages away: %w", err)
	}
	return nil
}

// zap does so for pages that are tracked. The kernel leaves a marker in place of
// each page that was protected, so that of those without one it is known that
// they were written to.
func (t *tracker) zap(p []byte, page int64) ([]region.Run, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.look(p, page); err != nil {
		return nil, err
	}
	if err := zapPages(p); err != nil {
		return nil, err
	}
	n := int64(len(p)) / pageSize
	clean := make([]bool, n)
	base := address(p)
	err := t.scanner.Protected(base, base+uintptr(len(p)), func(r uffd.Run) error {
		for a := r.Start; a < r.End; a += pageSize {
			clean[(a-uint64(base))/pageSize] = true
		}
		return nil
	})
	for i := range n {
		if !clean[i] || err != nil {
			t.note(page+i, false)
		}
	}
	var written []region.Run
	for i := page; i < page+n; i++ {
		if t.unsaved.Has(i) {
			written = appendPage(written, i)
		}
	}
	return written, err
}

func appendPage(runs []region.Run, page int64) []region.Run {
	if last := len(runs) - 1; last >= 0 && runs[last].End() == page {
		runs[last].N++
		return runs
	}
	return append(runs, region.Run{Page: page, N: 1})
}

// Drop makes landed pages absent; see region.Dropper. It holds their faults up
// until it is done, one block after the other.
func (l *landing) Drop(ctx context.Context, page, n int64) (kept []region.Run, err error) {
	for end := page + n; page < end; {
		const pages = hugeSize / pageSize
		stop := min(end, (page/pages+1)*pages)
		k, err := l.dropBlock(ctx, page, stop)
		kept = append(kept, k...)
		if err != nil {
			if stop < end {
				kept = append(kept, region.Run{Page: stop, N: end - stop})
			}
			return kept, err
		}
		page = stop
	}
	return kept, nil
}

func (l *landing) dropBlock(ctx context.Context, page, end int64) (kept []region.Run, err error) {
	all := []region.Run{{Page: page, N: end - page}}
	if l.zap == nil {
		return all, errNoSource
	}
	mu := l.lock(page * pageSize)
	defer mu.Unlock()
	written, err := l.zap(ctx, page, end-page)
	if err != nil {
		return all, err
	}
	at := page
	for _, w := range written {
		if w.Page < at || w.End() > end {
			return all, fmt.Errorf("pages %d+%d were not asked about", w.Page, w.N)
		}
		if err := l.forget(at, w.Page); err != nil {
			return append(kept, region.Run{Page: at, N: end - at}), err
		}
		kept, at = append(kept, w), w.End()
	}
	if err := l.forget(at, end); err != nil {
		return append(kept, region.Run{Page: at, N: end - at}), err
	}
	return kept, nil
}

// forget makes pages absent that are in nobody's page tables.
func (l *landing) forget(page, end int64) error {
	if page == end {
		return nil
	}
	// First of all, since a landed page that is in no page table and has no marker
	// counts as written to, and removing takes markers away.
	l.mark(page, end, pageAbsent)
	if err := unix.Madvise(l.fill[page*pageSize:end*pageSize], unix.MADV_REMOVE); err != nil {
		l.mark(page, end, pageLanded)
		return fmt.Errorf("give memory back: %w", err)
	}
	if l.protect != 0 {
		// The markers would be in the way of poison.
		if err := l.fd.WriteProtect(l.addr(page), uintptr(end-page)*pageSize, false, uffd.NoWake); err != nil && !gone(err) {
			return err
		}
	}
	return nil
}
