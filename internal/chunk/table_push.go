package chunk

import (
	"fmt"
	"math/bits"
	"slices"
)

// BeginPush picks the first run of dirty pages from page on, at most limit
// long, that is not on its way already. They are clean from now on; the caller
// reads and sends their bytes after this, so that a write meanwhile makes them
// dirty again, and calls EndPush. The run's length is 0 if there is none.
func (t *Table) BeginPush(page, limit int64) Run {
	r := t.nextPush(page, limit)
	each(r.Page, r.N, func(w int64, k uint64) bool {
		t.dirty.clear(w, k)
		t.slot(w).pushing |= k
		t.pushing += int64(bits.OnesCount64(k))
		return true
	})
	return r
}

func (t *Table) nextPush(page, limit int64) Run {
	for {
		page = t.dirty.next(page, t.pages, true)
		if page == t.pages {
			return Run{Page: page}
		}
		if s := t.slots[page/wordPages]; s == nil || s.pushing>>(page%wordPages)&1 == 0 {
			break
		}
		page++
	}
	end := page
	each(page, min(limit, t.pages-page), func(w int64, k uint64) bool {
		ready := t.dirty.word(w) & k
		if s := t.slots[w]; s != nil {
			ready &^= s.pushing
		}
		lead := bits.TrailingZeros64(k)
		end += int64(bits.TrailingZeros64(^(ready >> lead)))
		return ready == k
	})
	return Run{page, end - page}
}

// EndPush ends BeginPush. Pages that the remote accepted wait for its Sync;
// others are dirty again.
func (t *Table) EndPush(r Run, ok bool) {
	each(r.Page, r.N, func(w int64, k uint64) bool {
		s := t.slots[w]
		s.pushing &^= k
		t.pushing -= int64(bits.OnesCount64(k))
		if ok {
			t.unsynced.set(w, k)
		} else {
			t.dirty.set(w, k)
		}
		t.release(w, s)
		return true
	})
}

// Synced says how a Sync of the remote went that began when no push was under
// way: whether all that it had accepted is safe there, or has to be pushed
// again.
func (t *Table) Synced(ok bool) {
	switch {
	case !ok:
		t.dirty.add(t.unsynced)
	case t.persistent:
		t.pending.add(t.unsynced)
	}
	t.unsynced.reset()
}

// NeedsCommit reports whether a commit would have something to record.
func (t *Table) NeedsCommit() bool { return t.pending.count > 0 }

// BeginCommit fixes which pages the next commit concerns: those that changed
// since the last one. The caller then syncs the local backend, so that their
// bytes are safe, and calls Commit. It reports whether there are any.
func (t *Table) BeginCommit() bool {
	t.pending, t.staged = t.staged, t.pending
	return t.staged.count > 0
}

// Commit returns what the store has to be told of the pages of BeginCommit. A
// page counts as clean only where its bytes have not changed since then and
// the remote is known to have them. Pages that are neither dirty nor safely
// clean are left to the next commit: the remote has their bytes, so that
// whatever the store knows of them now is no harm. EndCommit must follow.
func (t *Table) Commit() []Change {
	var c changes
	active := t.activeWords()
	for page, n := t.staged.run(0, t.pages); n > 0; {
		end := page + n
		for page < end {
			if quiet := t.nextBusy(page, end, active); quiet > page {
				t.committing.setRange(page, quiet-page)
				t.clean.setRange(page, quiet-page)
				c.add(page, quiet-page, Present)
				page = quiet
				continue
			}
			page = t.commitWord(&c, page, end)
		}
		page, n = t.staged.run(end, t.pages)
	}
	return c
}

// changes grows a list of changes, joining those that touch.
type changes []Change

func (c *changes) add(page, n int64, s PageState) {
	if last := len(*c) - 1; last >= 0 {
		if l := &(*c)[last]; l.State == s && l.Page+l.N == page {
			l.N += n
			return
		}
	}
	*c = append(*c, Change{page, n, s})
}

// commitWord decides on the staged pages [from, to) as far as they are in one
// word, and returns where it stopped.
func (t *Table) commitWord(c *changes, from, to int64) int64 {
	w := from / wordPages
	k := maskOf(w, from, to)
	dirty := t.dirty.word(w) | t.unsynced.word(w)
	again := t.pending.word(w)
	if s := t.slots[w]; s != nil {
		dirty |= s.pushing
		if s.writers > 0 {
			again = ^uint64(0)
		}
	}
	again &= k &^ dirty
	dirty &= k
	t.pending.set(w, again)
	to = min(to, (w+1)*wordPages)
	for p := from; p < to; p++ {
		switch bit := uint64(1) << (p % wordPages); {
		case dirty&bit != 0:
			c.add(p, 1, Dirty)
		case again&bit == 0:
			t.committing.set(w, bit)
			t.clean.set(w, bit)
			c.add(p, 1, Present)
		}
	}
	return to
}

// activeWords lists the words with writes or pushes in progress, ascending.
func (t *Table) activeWords() []int64 {
	var ws []int64
	for w, s := range t.slots {
		if s.writers > 0 || s.pushing != 0 {
			ws = append(ws, w)
		}
	}
	slices.Sort(ws)
	return ws
}

// nextBusy returns the first page in [from, to) that needs a closer look
// before it is recorded as clean, or to.
func (t *Table) nextBusy(from, to int64, active []int64) int64 {
	to = t.dirty.next(from, to, true)
	to = t.unsynced.next(from, to, true)
	to = t.pending.next(from, to, true)
	if i, _ := slices.BinarySearch(active, from/wordPages); i < len(active) {
		to = max(from, min(to, active[i]*wordPages))
	}
	return to
}

// EndCommit ends Commit. What failed is part of the next one.
func (t *Table) EndCommit(ok bool) {
	if !ok {
		t.pending.add(t.staged)
	}
	t.staged.reset()
	t.committing.reset()
}

// Check returns an error if an invariant does not hold; for tests.
func (t *Table) Check() error {
	var fetching, landing, writing, pushing int64
	for w, s := range t.slots {
		p := t.present.word(w)
		z := t.zeroMask(w)
		var want uint64
		for _, f := range s.fetches {
			want |= *f.word(w)
		}
		switch {
		case s.idle():
			return fmt.Errorf("word %d: idle slot kept", w)
		case s.pushing&^p != 0:
			return fmt.Errorf("word %d: pushing %x not present", w, s.pushing&^p)
		case s.landing&p|s.writing&p|s.landing&s.writing|z&(p|s.landing|s.writing|s.fetching) != 0:
			return fmt.Errorf("word %d: landing %x, writing %x, zeroing %x and present %x overlap", w, s.landing, s.writing, z, p)
		case (s.fetching|s.landing|s.writing|z)&t.drop.mask(w) != 0 && t.drop.taken != nil:
			return fmt.Errorf("word %d: something happens to pages that are dropped", w)
		case s.fetching != want&^(s.landing|s.writing|p):
			return fmt.Errorf("word %d: fetching %x, wanted %x", w, s.fetching, want)
		case s.writing != 0 && s.writers == 0:
			return fmt.Errorf("word %d: writing %x without a writer", w, s.writing)
		}
		fetching += int64(bits.OnesCount64(s.fetching))
		landing += int64(bits.OnesCount64(s.landing))
		writing += int64(bits.OnesCount64(s.writing))
		pushing += int64(bits.OnesCount64(s.pushing))
	}
	if fetching != t.fetching || landing != t.landing || writing != t.writing || pushing != t.pushing {
		return fmt.Errorf("counts drifted: fetching %d/%d landing %d/%d writing %d/%d pushing %d/%d",
			t.fetching, fetching, t.landing, landing, t.writing, writing, t.pushing, pushing)
	}
	for _, b := range []struct {
		name string
		m    *bitmap
	}{{"dirty", t.dirty}, {"unsynced", t.unsynced}, {"pending", t.pending}, {"staged", t.staged}, {"committing", t.committing}, {"clean", t.clean}} {
		if b.m == nil || b.m == t.clean && t.drop.run.N > 0 {
			continue // what is being dropped may come back as clean as it was
		}
		for page, n := b.m.run(0, t.pages); n > 0; page, n = b.m.run(page+n, t.pages) {
			if !t.present.all(page, n) {
				return fmt.Errorf("pages %d+%d: %s but not all present", page, n, b.name)
			}
		}
	}
	return nil
}
