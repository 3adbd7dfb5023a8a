package chunk

// drop is what is being made absent again, of which there is one at a time.
//
//	BeginDrop   claims on the pages are void; no new claims, no new writes
//	DropBusy    until it finds nothing: what was under way ends
//	TakeDrop    the clean pages are absent; the store and the local backend are told
//	EndDrop     those that had to stay are present again, the rest can be fetched
type drop struct {
	run   Run
	taken []Run // by TakeDrop; not nil once it was called
}

// mask returns which pages of word w are being dropped.
func (d *drop) mask(w int64) uint64 {
	if !d.touches(w) {
		return 0
	}
	return maskOf(w, d.run.Page, d.run.End())
}

// touches tells whether any page of word w is. New writes keep out of such
// words: it isn't known which pages of a word a write is about.
func (d *drop) touches(w int64) bool {
	return d.run.N > 0 && d.run.Page < (w+1)*wordPages && d.run.End() > w*wordPages
}

// BeginDrop announces that pages are to be absent again, so that they will be
// fetched anew. What was requested for them before is stale from now on.
func (t *Table) BeginDrop(r Run) {
	t.drop = drop{run: r}
	each(r.Page, r.N, func(w int64, k uint64) bool {
		s := t.slots[w]
		if s == nil {
			return true
		}
		for _, f := range s.fetches {
			f.drop(w, k)
		}
		t.refetch(w, s)
		return true
	})
}

// DropBusy returns a page whose writing or landing the drop has to wait for, or
// -1.
func (t *Table) DropBusy() int64 { return t.busy(t.drop.run.Page, t.drop.run.N, true) }

// TakeDrop makes the pages absent, except those that the remote lacks or may
// lack, and returns which. No commit may be under way.
func (t *Table) TakeDrop() []Run {
	t.drop.taken = []Run{}
	each(t.drop.run.Page, t.drop.run.N, func(w int64, k uint64) bool {
		k &= t.present.word(w) &^ (t.dirty.word(w) | t.unsynced.word(w))
		if s := t.slots[w]; s != nil {
			k &^= s.pushing
		}
		if k == 0 {
			return true
		}
		t.present.clear(w, k)
		if t.persistent {
			t.pending.clear(w, k)
		}
		t.drop.taken = appendRuns(t.drop.taken, w, k)
		return true
	})
	return t.drop.taken
}

// EndDrop ends the drop. Pages of kept are present after all; recorded says
// that the store has all that were taken as absent.
func (t *Table) EndDrop(kept []Run, recorded bool) {
	taken := t.drop.taken
	t.drop = drop{}
	if t.persistent && recorded {
		for _, r := range taken {
			t.clean.clearRange(r.Page, r.N)
		}
	}
	for _, r := range kept {
		t.present.setRange(r.Page, r.N)
		if t.persistent {
			t.pending.setRange(r.Page, r.N)
		}
	}
}

// Clean reports whether the remote has all of the pages that are local.
func (t *Table) Clean(page, n int64) bool {
	end := page + n
	if t.dirty.next(page, end, true) < end || t.unsynced.next(page, end, true) < end {
		return false
	}
	if t.pushing == 0 {
		return true
	}
	for w, s := range t.slots {
		if w*wordPages < end && (w+1)*wordPages > page && s.pushing&maskOf(w, page, end) != 0 {
			return false
		}
	}
	return true
}
