package chunk

import (
	"fmt"
	"math/bits"
	"slices"
)

// Run is N pages from Page on.
type Run struct{ Page, N int64 }

// End returns the page after the last one.
func (r Run) End() int64 { return r.Page + r.N }

// State is where a page stands, seen from the outside. A page that is pushing
// may be dirty again as well.
type State uint8

// The states of a page.
const (
	StateAbsent   State = iota // only at the remote
	StateFetching              // requested from the remote
	StateLanding               // its bytes are being written to the local backend
	StateWriting               // an application's write is making it present
	StatePresent               // local
	StateDirty                 // local, and to be pushed
	StatePushing               // local, and sent to the remote
)

func (s State) String() string {
	switch s {
	case StateAbsent:
		return "absent"
	case StateFetching:
		return "fetching"
	case StateLanding:
		return "landing"
	case StateWriting:
		return "writing"
	case StatePresent:
		return "present"
	case StateDirty:
		return "dirty"
	case StatePushing:
		return "pushing"
	}
	return "unknown"
}

// Table holds the state of every page of a region.
//
//	                 Claim            Land             Landed
//	        absent ---------> fetching ------> landing --------> present
//	          |  ^               |  |  EndFetch                    |  ^
//	          |  |               |  +--> absent        BeginWrite, |  | EndPush
//	BeginWrite|  |EndWrite(fail) | BeginWrite            EndWrite  |  |
//	          v  |               v                                 v  |
//	         writing <-----------+       EndWrite     BeginPush
//	            +---------------------------> dirty -----------> pushing
//	                                           ^  EndPush(fail)     |
//	                                           +--------------------+
//
// Presence shrinks by a drop alone, which takes present pages that are neither
// dirty nor on their way back to absent; see BeginDrop. Except for Resident and
// Complete, which anyone may call at any time, calls need mutual exclusion; a
// page's bytes are moved outside of it, between the call that announces it
// (Land, BeginWrite, BeginPush, BeginZero) and the one that ends it.
//
// Invariants, over the pages of a table:
//
//   - dirty, pushing and unsynced pages are present;
//   - landing, writing, zeroing and present exclude each other;
//   - a page is fetching if and only if some live Fetch wants it and it is
//     none of those;
//   - pushing is set by one push at a time;
//   - committing pages are present, not dirty, and not being written;
//   - nothing lands in, is written to or fetched for pages that are dropped.
type Table struct {
	pages      int64
	persistent bool

	present *bitmap // local bytes are valid
	dirty   *bitmap // the remote lacks the local bytes, or may
	// unsynced pages were accepted by the remote but not yet synced there.
	unsynced *bitmap

	// The rest describes what a persistent store knows, and is unused without
	// one. pending pages changed since the last BeginCommit; staged ones are
	// those of the commit in progress; committing ones are being recorded as
	// clean, so that they can't be written until that is done; clean ones are
	// recorded as clean, so that an intent must precede a write to them.
	pending, staged, committing, clean *bitmap

	slots   map[int64]*slot // by word; in-flight state
	free    []*slot
	zeroing []Run // being settled as zero, see BeginZero
	zeros   int64 // pages in zeroing
	drop    drop

	fetching, landing, writing, pushing int64 // pages, over all slots
}

// maxFreeSlots bounds how many unused slots are kept for reuse.
const maxFreeSlots = 1024

// slot is what happens to the 64 pages of one word.
type slot struct {
	fetching uint64 // derived: wanted by a fetch and idle otherwise
	landing  uint64
	writing  uint64
	pushing  uint64
	writers  int // local writes in progress that touch the slot
	fetches  []*Fetch
}

func (s *slot) idle() bool {
	return s.landing|s.writing|s.pushing == 0 && s.writers == 0 && len(s.fetches) == 0
}

// Fetch is a claim on pages that are requested from the remote. It is the
// version that the blueprint speaks of: a write takes its pages out of every
// claim, so that what arrives for them later is dropped.
type Fetch struct {
	Run
	Owner  any      // for the caller
	want   []uint64 // by word, from Page/64 on
	wanted int64
}

// Wanted returns how many pages the fetch still waits for.
func (f *Fetch) Wanted() int64 { return f.wanted }

// Span returns the shortest run that holds all that f waits for.
func (f *Fetch) Span() Run {
	var s Run
	for i, k := range f.want {
		if k == 0 {
			continue
		}
		at := (f.Page/wordPages + int64(i)) * wordPages
		if s.N == 0 {
			s.Page = at + int64(bits.TrailingZeros64(k))
		}
		s.N = at + int64(bits.Len64(k)) - s.Page
	}
	return s
}

// Fetches returns those that want a page, or one near it. The slice is valid
// until the next change.
func (t *Table) Fetches(page int64) []*Fetch {
	if s := t.slots[page/wordPages]; s != nil {
		return s.fetches
	}
	return nil
}

// Wants reports whether f waits for a page.
func (f *Fetch) Wants(page int64) bool {
	return page >= f.Page && page < f.End() && *f.word(page / wordPages)>>(page%wordPages)&1 != 0
}

func (f *Fetch) word(w int64) *uint64 { return &f.want[w-f.Page/wordPages] }

func (f *Fetch) drop(w int64, k uint64) {
	p := f.word(w)
	f.wanted -= int64(bits.OnesCount64(*p & k))
	*p &^= k
}

// New returns a table of absent pages. A persistent one also tracks what its
// store has to be told.
func New(pages int64, persistent bool) *Table {
	t := &Table{
		pages: pages, persistent: persistent,
		present: newSharedBitmap(pages), dirty: newBitmap(pages), unsynced: newBitmap(pages),
		slots: make(map[int64]*slot),
	}
	if persistent {
		t.pending, t.staged = newBitmap(pages), newBitmap(pages)
		t.committing, t.clean = newBitmap(pages), newBitmap(pages)
	}
	return t
}

// Pages returns the size of the table.
func (t *Table) Pages() int64 { return t.pages }

// Resident reports whether n pages from page on are all present. It needs no
// lock.
func (t *Table) Resident(page, n int64) bool { return t.present.all(page, n) }

// NextAbsent returns the first page in [from, to) that is not present, idle or
// not, or to. It needs no lock.
func (t *Table) NextAbsent(from, to int64) int64 { return t.present.next(from, to, false) }

// NextPresent returns the first page in [from, to) that is present, or to. It
// needs no lock.
func (t *Table) NextPresent(from, to int64) int64 { return t.present.next(from, to, true) }

// Counts are numbers of pages.
type Counts struct {
	Present, Dirty, Unsynced, Fetching, Landing, Writing, Pushing int64
}

// Counts returns how many pages are in which state.
func (t *Table) Counts() Counts {
	return Counts{
		Present: t.present.count, Dirty: t.dirty.count, Unsynced: t.unsynced.count,
		Fetching: t.fetching, Landing: t.landing + t.zeros, Writing: t.writing, Pushing: t.pushing,
	}
}

// Complete reports whether all pages are present.
func (t *Table) Complete() bool { return t.present.count == t.pages }

// Load marks pages as a store remembers them, before anything else happens.
func (t *Table) Load(page, n int64, dirty bool) error {
	if page < 0 || n < 0 || page > t.pages || n > t.pages-page {
		return fmt.Errorf("pages %d+%d of %d: out of range", page, n, t.pages)
	}
	t.present.setRange(page, n)
	if dirty {
		t.dirty.setRange(page, n)
	} else if t.persistent {
		t.clean.setRange(page, n)
	}
	return nil
}

// State returns where a page stands.
func (t *Table) State(page int64) State {
	w, k := page/wordPages, uint64(1)<<(page%wordPages)
	s := t.slots[w]
	switch {
	case s != nil && s.pushing&k != 0:
		return StatePushing
	case t.dirty.has(page):
		return StateDirty
	case t.present.has(page):
		return StatePresent
	case s != nil && s.landing&k != 0, t.zeroMask(w)&k != 0:
		return StateLanding
	case s != nil && s.writing&k != 0:
		return StateWriting
	case s != nil && s.fetching&k != 0:
		return StateFetching
	}
	return StateAbsent
}

// each calls fn for every word that has pages in [page, page+n), with their
// mask, until fn returns false.
func each(page, n int64, fn func(w int64, k uint64) bool) {
	for end := page + n; page < end; {
		w := page / wordPages
		if !fn(w, maskOf(w, page, end)) {
			return
		}
		page = (w + 1) * wordPages
	}
}

func (t *Table) slot(w int64) *slot {
	if s := t.slots[w]; s != nil {
		return s
	}
	var s *slot
	if n := len(t.free); n > 0 {
		s, t.free = t.free[n-1], t.free[:n-1]
	} else {
		s = new(slot)
	}
	t.slots[w] = s
	return s
}

// release gives slot w up if nothing happens in it any more.
func (t *Table) release(w int64, s *slot) {
	if !s.idle() {
		return
	}
	delete(t.slots, w)
	if len(t.free) < maxFreeSlots {
		t.free = append(t.free, s)
	}
}

// refetch derives s.fetching after a change of anything that it depends on.
func (t *Table) refetch(w int64, s *slot) {
	var k uint64
	for _, f := range s.fetches {
		k |= *f.word(w)
	}
	k &^= s.landing | s.writing | t.present.word(w)
	t.fetching += int64(bits.OnesCount64(k) - bits.OnesCount64(s.fetching))
	s.fetching = k
}

// idle returns which pages of mask k in word w are absent and at rest; with
// dup, those that are fetching too.
func (t *Table) idle(w int64, k uint64, dup bool) uint64 {
	k &^= t.present.word(w)
	if k == 0 {
		return 0
	}
	if s := t.slots[w]; s != nil {
		k &^= s.landing | s.writing
		if !dup {
			k &^= s.fetching
		}
	}
	if len(t.zeroing) > 0 {
		k &^= t.zeroMask(w)
	}
	if t.drop.run.N > 0 {
		k &^= t.drop.mask(w)
	}
	return k
}

// NextIdle returns the first run, at most limit pages long, of absent pages in
// [from, to) that nothing happens to; its length is 0 if there is none.
func (t *Table) NextIdle(from, to, limit int64) Run {
	for {
		from = t.present.next(from, to, false)
		if from == to {
			return Run{Page: to}
		}
		w := from / wordPages
		if k := t.idle(w, maskOf(w, from, to), false); k != 0 {
			from = w*wordPages + int64(bits.TrailingZeros64(k))
			break
		}
		from = min(to, (w+1)*wordPages)
	}
	end := from
	each(from, min(limit, to-from), func(w int64, k uint64) bool {
		free := t.idle(w, k, false)
		lead := bits.TrailingZeros64(k)
		run := bits.TrailingZeros64(^(free >> lead))
		end += int64(run)
		return free == k
	})
	return Run{from, end - from}
}

// Claim asks for the pages of [page, page+n) that are absent; with dup, also
// for those that another fetch has asked for already: whichever arrives first
// is used. It returns nil where that is no page at all.
func (t *Table) Claim(page, n int64, dup bool) *Fetch {
	first := page / wordPages
	f := &Fetch{Run: Run{page, n}, want: make([]uint64, (page+n-1)/wordPages-first+1)}
	each(page, n, func(w int64, k uint64) bool {
		if k = t.idle(w, k, dup); k == 0 {
			return true
		}
		f.want[w-first] = k
		f.wanted += int64(bits.OnesCount64(k))
		s := t.slot(w)
		s.fetches = append(s.fetches, f)
		t.refetch(w, s)
		return true
	})
	if f.wanted == 0 {
		return nil
	}
	return f
}

// Land announces that bytes for [page, page+n) have arrived for f, and appends
// to dst the runs that must now be written to the local backend, each to be
// followed by Landed. Pages that were written, fetched by another or are
// landing already are left out: their bytes are stale, or not needed.
func (t *Table) Land(f *Fetch, page, n int64, dst []Run) []Run {
	each(page, n, func(w int64, k uint64) bool {
		want := *f.word(w) & k
		if want == 0 {
			return true
		}
		f.drop(w, k)
		s := t.slot(w)
		want &^= s.landing | s.writing | t.present.word(w) | t.zeroMask(w)
		s.landing |= want
		t.landing += int64(bits.OnesCount64(want))
		t.refetch(w, s)
		dst = appendRuns(dst, w, want)
		return true
	})
	return dst
}

// appendRuns appends the pages of mask k in word w, joined to the last run
// where they touch.
func appendRuns(dst []Run, w int64, k uint64) []Run {
	for k != 0 {
		lo := bits.TrailingZeros64(k)
		n := bits.TrailingZeros64(^(k >> lo))
		page := w*wordPages + int64(lo)
		if last := len(dst) - 1; last >= 0 && dst[last].End() == page {
			dst[last].N += int64(n)
		} else {
			dst = append(dst, Run{page, int64(n)})
		}
		if lo+n == wordPages {
			break
		}
		k &^= (1<<n - 1) << lo
	}
	return dst
}

// Landed ends a run of Land: its pages are present now, or absent if ok is
// false.
func (t *Table) Landed(r Run, ok bool) {
	each(r.Page, r.N, func(w int64, k uint64) bool {
		s := t.slots[w]
		s.landing &^= k
		t.landing -= int64(bits.OnesCount64(k))
		if ok {
			t.setPresent(w, k)
		}
		t.refetch(w, s)
		t.release(w, s)
		return true
	})
}

func (t *Table) setPresent(w int64, k uint64) {
	t.present.set(w, k)
	if t.persistent {
		t.pending.set(w, k)
	}
}

// EndFetch gives up what f still wants. It must be called once for each Claim,
// when no more Land will follow.
func (t *Table) EndFetch(f *Fetch) {
	f.wanted = 0
	clear(f.want)
	each(f.Page, f.N, func(w int64, _ uint64) bool {
		s := t.slots[w]
		if s == nil {
			return true
		}
		if i := slices.Index(s.fetches, f); i >= 0 {
			s.fetches = slices.Delete(s.fetches, i, i+1)
			t.refetch(w, s)
			t.release(w, s)
		}
		return true
	})
}

// BeginWrite announces a local write of whole pages, or of parts of present
// ones. Absent pages in the range are claimed by it, out of every fetch. It
// changes nothing and returns the first page that is in the way, or -1 when
// the write may go on: bytes that are landing, another write to an absent page
// or the recording of a page as clean have to end first.
func (t *Table) BeginWrite(page, n int64) (busy int64) {
	if busy = t.busy(page, n, false); busy >= 0 {
		return busy
	}
	each(page, n, func(w int64, k uint64) bool {
		s := t.slot(w)
		s.writers++
		claim := k &^ t.present.word(w)
		s.writing |= claim
		t.writing += int64(bits.OnesCount64(claim))
		for _, f := range s.fetches {
			f.drop(w, k)
		}
		t.refetch(w, s)
		return true
	})
	return -1
}

// busy returns the first page that is in the way of a new write, or of a drop
// that has begun, and -1 when nothing is.
func (t *Table) busy(page, n int64, dropping bool) int64 {
	at := int64(-1)
	each(page, n, func(w int64, k uint64) bool {
		var b uint64
		if s := t.slots[w]; s != nil {
			b = s.landing | s.writing
			if dropping && s.writers > 0 { // it isn't known of which pages
				b = ^uint64(0)
			}
		}
		if len(t.zeroing) > 0 {
			b |= t.zeroMask(w)
		}
		if t.persistent {
			b |= t.committing.word(w)
		}
		if !dropping && t.drop.touches(w) {
			b = ^uint64(0)
		}
		if b &= k; b != 0 {
			at = w*wordPages + int64(bits.TrailingZeros64(b))
			return false
		}
		return true
	})
	return at
}

// Intents appends to dst the runs of a write's pages that the store holds as
// clean: it must be told before their bytes change.
func (t *Table) Intents(page, n int64, dst []Run) []Run {
	if !t.persistent {
		return dst
	}
	for p, k := t.clean.run(page, page+n); k > 0; p, k = t.clean.run(p+k, page+n) {
		dst = append(dst, Run{p, k})
	}
	return dst
}

// unclaim ends what BeginWrite did to the pages of mask k in word w.
func (t *Table) unclaim(w int64, k uint64) *slot {
	s := t.slots[w]
	s.writers--
	claim := s.writing & k
	s.writing &^= claim
	t.writing -= int64(bits.OnesCount64(claim))
	return s
}

// EndWrite ends BeginWrite: the pages are present and dirty. If ok is false
// those that were absent are so again, and the others dirty, since their bytes
// may have changed.
func (t *Table) EndWrite(page, n int64, ok bool) {
	each(page, n, func(w int64, k uint64) bool {
		s := t.unclaim(w, k)
		if !ok {
			k &= t.present.word(w)
		}
		t.present.set(w, k)
		t.dirty.set(w, k)
		if t.persistent {
			t.pending.set(w, k)
			t.clean.clear(w, k)
		}
		t.refetch(w, s)
		t.release(w, s)
		return true
	})
}

// AbortWrite ends BeginWrite where no byte was changed.
func (t *Table) AbortWrite(page, n int64) {
	each(page, n, func(w int64, k uint64) bool {
		s := t.unclaim(w, k)
		t.refetch(w, s)
		t.release(w, s)
		return true
	})
}
