package uffd

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/zero"
)

// zeroes are copied where a page of zeroes can't be mapped.
var zeroes [hugeSize]byte

// install puts pages into the process that have arrived, but for those that it
// has removed. Some may be there already.
func (x *session) install(m *mapped, from, to int64) error { return x.place(m, from, to, x.put) }

// zero gives a page of zeroes to a process that has removed it.
func (x *session) zero(m *mapped, at int64) error {
	return x.place(m, at, at+m.PageSize, x.putZero)
}

// place has put make pages [from, to) present, of which it tells how far it
// came.
func (x *session) place(m *mapped, from, to int64, put func(m *mapped, from, to int64) (int64, error)) error {
	step := to - from
	for from < to {
		n, err := put(m, from, min(from+step, to))
		from += n
		switch {
		case err == nil:
		case errors.Is(err, unix.EEXIST):
			err = x.fd.Wake(uintptr(m.Addr)+uintptr(from), uintptr(m.PageSize))
			from += m.PageSize
			if err != nil && !gone(err) {
				return err
			}
		case errors.Is(err, unix.EAGAIN): // an event wants to be read first
			select {
			case <-time.After(eventPause):
			case <-x.ctx.Done():
				return errGone
			}
		case errors.Is(err, unix.ENOENT):
			// A part is no longer mapped: page by page, past those.
			if step == m.PageSize {
				from += m.PageSize
			}
			step = m.PageSize
		case errors.Is(err, unix.ESRCH):
			x.cancel()
			return errGone
		default:
			return err
		}
	}
	return nil
}

// put installs pages [from, to) up to the first that was removed, past which it
// goes, and returns how far it came.
func (x *session) put(m *mapped, from, to int64) (int64, error) {
	x.order.RLock()
	defer x.order.RUnlock()
	if m.removed.Has(from / m.PageSize) {
		return m.PageSize, nil
	}
	end := from + m.PageSize
	for end < to && !m.removed.Has(end/m.PageSize) {
		end += m.PageSize
	}
	p := x.src.local.mem[m.Offset+from : min(m.Offset+end, int64(len(x.src.local.mem)))]
	if m.PageSize == pageSize && zero.Is(p) {
		n, err := x.fd.ZeroPage(uintptr(m.Addr)+uintptr(from), uintptr(end-from), 0)
		return int64(n), err
	}
	n, err := x.fd.Copy(uintptr(m.Addr)+uintptr(from), p, 0)
	return int64(n), err
}

// putZero is put for a page that was removed.
func (x *session) putZero(m *mapped, from, to int64) (int64, error) {
	x.order.RLock()
	defer x.order.RUnlock()
	addr := uintptr(m.Addr) + uintptr(from)
	if m.PageSize == pageSize {
		n, err := x.fd.ZeroPage(addr, uintptr(to-from), 0)
		return int64(n), err
	}
	n, err := x.fd.Copy(addr, zeroes[:to-from], 0)
	return int64(n), err
}

// populate installs what arrives. When settle ends it sees to it that
// everything does, and then lets the process go.
func (x *session) populate(settle context.Context) {
	left := x.pieces()
	settling, complete := settle.Done(), x.src.region.Done()
	// What arrived is in the region's books a moment later.
	var soon <-chan time.Time
	for {
		var err error
		if left, err = x.pass(left); err != nil {
			return
		}
		if len(left) == 0 && settling == nil {
			x.release()
			return
		}
		select {
		case <-x.more:
			soon = time.After(populatePause)
		case <-soon:
			soon = nil
		case <-complete:
			complete = nil
		case <-settling:
			settling = nil
			complete = x.src.region.Done()
			x.wg.Go(x.pullAll)
		case <-x.ctx.Done():
			return
		}
	}
}

// pullAll has everything fetched, however long that takes.
func (x *session) pullAll() {
	for x.ctx.Err() == nil && x.src.region.Pull(x.ctx) != nil {
		select {
		case <-time.After(retryPause):
		case <-x.ctx.Done():
		}
	}
}

// piece is a part of a mapping that is installed at once.
type piece struct {
	m        *mapped
	from, to int64
}

func (x *session) pieces() (all []piece) {
	for _, m := range x.maps {
		step := max(x.chunk, m.PageSize)
		for at := int64(0); at < m.Size; {
			to := min(m.Size, (m.Offset+at+step)/step*step-m.Offset)
			to = max(to/m.PageSize*m.PageSize, at+m.PageSize)
			all = append(all, piece{m, at, min(to, m.Size)})
			at = to
		}
	}
	return all
}

// pass installs the pieces that are here, and returns the others.
func (x *session) pass(pieces []piece) ([]piece, error) {
	left := pieces[:0]
	for _, p := range pieces {
		if x.ctx.Err() != nil {
			return nil, errGone
		}
		if !x.here(p.m, p.from, p.to) {
			left = append(left, p)
			continue
		}
		if err := x.install(p.m, p.from, p.to); err != nil {
			if !errors.Is(err, errGone) {
				x.src.log.Error("pages can't be installed", "error", err)
			}
			return nil, err
		}
	}
	return left, nil
}

// release takes the memory out of userfaultfd's hands. What the process has
// removed, or removes from now on, the kernel makes zero.
func (x *session) release() {
	for _, m := range x.maps {
		if err := x.fd.Unregister(uintptr(m.Addr), uintptr(m.Size)); err != nil && !gone(err) {
			x.src.log.Error("memory can't be let go", "error", err)
		}
	}
	x.cancel()
}
