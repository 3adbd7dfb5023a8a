package chunk

import (
	"math/bits"
	"slices"
)

func (t *Table) zeroMask(w int64) uint64 {
	var k uint64
	for _, z := range t.zeroing {
		if z.Page < (w+1)*wordPages && z.End() > w*wordPages {
			k |= maskOf(w, z.Page, z.End())
		}
	}
	return k
}

// BeginZero picks the first run of idle absent pages in [page, page+n), which
// the remote holds as zero. The caller makes the run zero in the local backend
// and calls EndZero. However long it is, this costs no more than a look at the
// pages in flight. The run's length is 0 if there is none.
func (t *Table) BeginZero(page, n int64) Run {
	to := page + n
	r := t.NextIdle(page, to, 1)
	if r.N == 0 {
		return r
	}
	end := t.present.next(r.Page, to, true)
	for w, s := range t.slots {
		if w*wordPages >= end || (w+1)*wordPages <= r.Page {
			continue
		}
		if k := (s.fetching | s.landing | s.writing) & maskOf(w, r.Page, end); k != 0 {
			end = w*wordPages + int64(bits.TrailingZeros64(k))
		}
	}
	for _, z := range t.zeroing {
		if z.Page >= r.Page {
			end = min(end, z.Page)
		}
	}
	if d := t.drop.run; d.N > 0 && d.Page >= r.Page {
		end = min(end, d.Page)
	}
	r.N = end - r.Page
	t.zeroing = append(t.zeroing, r)
	t.zeros += r.N
	return r
}

// EndZero ends BeginZero: the run is present now, or absent if ok is false.
func (t *Table) EndZero(r Run, ok bool) {
	i := slices.Index(t.zeroing, r)
	t.zeroing = slices.Delete(t.zeroing, i, i+1)
	t.zeros -= r.N
	if !ok {
		return
	}
	t.present.setRange(r.Page, r.N)
	if t.persistent {
		t.pending.setRange(r.Page, r.N)
	}
}
