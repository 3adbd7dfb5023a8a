package cache

import (
	"math/bits"
	"sync/atomic"
)

// status is what the cache knows of a page. The two bits are kept in two
// planes of a leaf.
type status uint8

const (
	absent   status = 0 // only at the remote
	clean    status = 1 // local, and as the remote has it
	dirty    status = 2 // local, recorded as not pushed
	intended status = 3 // was clean, and may have been written to since
)

const (
	leafWords = 512
	leafPages = leafWords * 64 // 128 MiB of region
)

// leaf is the status of leafPages pages: bit p of lo and hi is that of page p.
type leaf struct {
	epoch  uint64 // of the pageMap when it was made; older ones are shared
	lo, hi [leafWords]atomic.Uint64
}

// uniform leaves are shared by all maps and never changed: a region that is
// all in one state takes no memory. A nil leaf is absent.
var uniform [4]*leaf

func init() {
	for s := clean; s <= intended; s++ {
		l := new(leaf)
		for w := range leafWords {
			l.lo[w].Store(-uint64(s & 1))
			l.hi[w].Store(-uint64(s >> 1))
		}
		uniform[s] = l
	}
}

// pageMap is the status of every page of a region. Leaves are made when they
// are first needed, and copied when they change after a snapshot.
//
// needsIntent may be called at any time; all else by one goroutine at a time.
// Where both bits of a page change, they do so by way of intended, so that
// needsIntent never sees a page as clean that has not been.
type pageMap struct {
	pages  int64
	epoch  uint64
	leaves []atomic.Pointer[leaf]
}

func newPageMap(pages int64) *pageMap {
	return &pageMap{pages: pages, epoch: 1, leaves: make([]atomic.Pointer[leaf], (pages+leafPages-1)/leafPages)}
}

// own returns leaf i for changing.
func (m *pageMap) own(i int64) *leaf {
	l := m.leaves[i].Load()
	if l != nil && l.epoch == m.epoch {
		return l
	}
	c := &leaf{epoch: m.epoch}
	if l != nil {
		for w := range leafWords {
			c.lo[w].Store(l.lo[w].Load())
			c.hi[w].Store(l.hi[w].Load())
		}
	}
	m.leaves[i].Store(c)
	return c
}

// mask has the bits of the pages from and up to to, both relative to a word,
// as far as they are in it.
func mask(from, to int64) uint64 {
	from, to = max(from, 0), min(to, 64)
	if from >= to {
		return 0
	}
	return ^uint64(0) >> (64 - (to - from)) << from
}

// eachWord calls fn for the words that [page, page+n) touches, with the bits
// it has in them, until fn returns false.
func eachWord(page, n int64, fn func(leaf, word int64, bits uint64) bool) {
	for end := page + n; page < end; {
		l, w := page/leafPages, page%leafPages/64
		start := page &^ 63
		if !fn(l, w, mask(page-start, end-start)) {
			return
		}
		page = start + 64
	}
}

// needsIntent tells whether any of the pages is clean.
func (m *pageMap) needsIntent(page, n int64) bool {
	found := false
	eachWord(page, n, func(i, w int64, b uint64) bool {
		l := m.leaves[i].Load()
		found = l != nil && l.lo[w].Load()&^l.hi[w].Load()&b != 0
		return !found
	})
	return found
}

// set gives all the pages one status.
func (m *pageMap) set(page, n int64, s status) {
	for end := page + n; page < end; {
		i := page / leafPages
		first, last := i*leafPages, min((i+1)*leafPages, m.pages)
		to := min(end, last)
		if page == first && to == last {
			m.leaves[i].Store(m.whole(i, s))
		} else {
			m.setInLeaf(m.own(i), page-first, to-page, s)
		}
		page = to
	}
}

// whole returns a leaf for when all pages of leaf i have status s.
func (m *pageMap) whole(i int64, s status) *leaf {
	if (i+1)*leafPages <= m.pages || s == absent {
		return uniform[s]
	}
	l := &leaf{epoch: m.epoch} // bits past the last page stay zero
	m.setInLeaf(l, 0, m.pages-i*leafPages, s)
	return l
}

func (m *pageMap) setInLeaf(l *leaf, page, n int64, s status) {
	eachWord(page, n, func(_, w int64, b uint64) bool {
		lo, hi := &l.lo[w], &l.hi[w]
		if s&2 != 0 { // first, so that a page that was clean is seen as intended
			hi.Or(b)
		}
		if s&1 != 0 {
			lo.Or(b)
		} else {
			lo.And(^b)
		}
		if s&2 == 0 {
			hi.And(^b)
		}
		return true
	})
}

// intend makes the clean ones of the pages intended.
func (m *pageMap) intend(page, n int64) {
	eachWord(page, n, func(i, w int64, b uint64) bool {
		l := m.leaves[i].Load()
		if l == nil {
			return true
		}
		if c := l.lo[w].Load() &^ l.hi[w].Load() & b; c != 0 {
			m.own(i).hi[w].Or(c)
		}
		return true
	})
}

// dropClean makes all clean pages absent.
func (m *pageMap) dropClean() {
	for i := range m.leaves {
		l := m.leaves[i].Load()
		switch l {
		case nil, uniform[dirty], uniform[intended]:
			continue
		case uniform[clean]:
			m.leaves[i].Store(nil)
			continue
		}
		l = m.own(int64(i))
		for w := range leafWords {
			l.lo[w].And(l.hi[w].Load())
		}
	}
}

// runs calls fn for each maximal run of pages of one status, absent ones too,
// in ascending order.
func (m *pageMap) runs(fn func(page, n int64, s status) error) error {
	start, cur := int64(0), absent
	flush := func(end int64) error {
		if end > start {
			return fn(start, end-start, cur)
		}
		return nil
	}
	for i := range m.leaves {
		first := int64(i) * leafPages
		err := m.leaves[i].Load().runs(min(leafPages, m.pages-first), func(page, _ int64, s status) error {
			if s == cur {
				return nil
			}
			if err := flush(first + page); err != nil {
				return err
			}
			start, cur = first+page, s
			return nil
		})
		if err != nil {
			return err
		}
	}
	return flush(m.pages)
}

// runs is the same for the first n pages of a leaf, which may be nil.
func (l *leaf) runs(n int64, fn func(page, n int64, s status) error) error {
	for page := int64(0); page < n; {
		s := l.get(page)
		end := min(l.runEnd(page, s), n)
		if err := fn(page, end-page, s); err != nil {
			return err
		}
		page = end
	}
	return nil
}

func (l *leaf) get(page int64) status {
	if l == nil {
		return absent
	}
	w, b := page/64, page%64
	return status(l.lo[w].Load()>>b&1 | l.hi[w].Load()>>b&1<<1)
}

// runEnd returns the first page after page that is not in status s.
func (l *leaf) runEnd(page int64, s status) int64 {
	if l == nil || l == uniform[s] {
		return leafPages
	}
	lo, hi := -uint64(s&1), -uint64(s>>1)
	for w := page / 64; w < leafWords; w++ {
		differ := (l.lo[w].Load() ^ lo) | (l.hi[w].Load() ^ hi)
		if w == page/64 {
			differ &= ^uint64(0) << (page % 64)
		}
		if differ != 0 {
			return w*64 + int64(bits.TrailingZeros64(differ))
		}
	}
	return leafPages
}

// snapshot returns the map as it is now; later changes don't show in it.
func (m *pageMap) snapshot() *pageMap {
	s := &pageMap{pages: m.pages, epoch: m.epoch, leaves: make([]atomic.Pointer[leaf], len(m.leaves))}
	for i := range m.leaves {
		s.leaves[i].Store(m.leaves[i].Load())
	}
	m.epoch++ // all leaves are shared from now on
	return s
}

// adopt replaces leaves that did not change since the snapshot was taken by
// the uniform ones they are equal to.
func (m *pageMap) adopt(snapshot *pageMap) {
	for i := range m.leaves {
		l := snapshot.leaves[i].Load()
		if l == nil || m.leaves[i].Load() != l || (int64(i)+1)*leafPages > m.pages {
			continue
		}
		if s := l.get(0); l.runEnd(0, s) == leafPages {
			m.leaves[i].Store(uniform[s])
		}
	}
}

// count returns the number of pages of each status.
func (m *pageMap) count() (n [4]int64) {
	m.runs(func(_, k int64, s status) error { n[s] += k; return nil }) //nolint:errcheck // fn returns none
	return n
}
