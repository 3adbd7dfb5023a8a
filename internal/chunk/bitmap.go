package chunk

import (
	"math/bits"
	"sync/atomic"
)

const (
	wordPages  = 64
	blockWords = 512
	blockPages = wordPages * blockWords // 128 MiB of region
)

// block is 32768 pages. ones counts set bits and belongs to whoever may change
// the bitmap; words may be read by anyone.
type block struct {
	ones  int64
	words [blockWords]atomic.Uint64
}

// fullBlock stands for every block whose pages are all set. It is never
// written.
var fullBlock = func() *block {
	b := &block{ones: blockPages}
	for i := range b.words {
		b.words[i].Store(^uint64(0))
	}
	return b
}()

// bitmap is a set of pages. Blocks that are all clear or all set cost a
// pointer, so that a 1 TiB region takes 64 KiB until it is touched, and the
// pointers are the summary that lets a search skip 128 MiB at a time.
//
// Changes need mutual exclusion; has, all and word do not: a bit read beside a
// change is the old or the new one.
type bitmap struct {
	pages  int64
	count  int64
	blocks []atomic.Pointer[block]
	spare  *block // last block that was given up, all clear
	// shared bitmaps are read beside changes: a block that was given up may
	// still be looked at, and must not turn into another one.
	shared bool
}

func newBitmap(pages int64) *bitmap {
	return &bitmap{pages: pages, blocks: make([]atomic.Pointer[block], (pages+blockPages-1)/blockPages)}
}

func newSharedBitmap(pages int64) *bitmap {
	m := newBitmap(pages)
	m.shared = true
	return m
}

// valid returns how many pages block i has; fewer than blockPages at the end.
func (m *bitmap) valid(i int64) int64 {
	return min(blockPages, m.pages-i*blockPages)
}

// word returns the 64 bits from page w*64 on. Bits past the last page are
// unspecified.
func (m *bitmap) word(w int64) uint64 {
	b := m.blocks[w/blockWords].Load()
	if b == nil {
		return 0
	}
	return b.words[w%blockWords].Load()
}

func (m *bitmap) has(page int64) bool {
	return m.word(page/wordPages)>>(page%wordPages)&1 != 0
}

// all reports whether the n pages from page on are all set.
func (m *bitmap) all(page, n int64) bool {
	for end := page + n; page < end; {
		b := m.blocks[page/blockPages].Load()
		if b == nil {
			return false
		}
		stop := min(end, (page/blockPages+1)*blockPages)
		if b == fullBlock {
			page = stop
			continue
		}
		for page < stop {
			w := page / wordPages
			k := maskOf(w, page, stop)
			if b.words[w%blockWords].Load()&k != k {
				return false
			}
			page = (w + 1) * wordPages
		}
	}
	return true
}

// maskOf returns the bits of word w that lie in pages [from, to).
func maskOf(w, from, to int64) uint64 {
	k := ^uint64(0)
	if lo := from - w*wordPages; lo > 0 {
		k <<= uint(lo)
	}
	if hi := to - w*wordPages; hi < wordPages {
		k &= 1<<uint(hi) - 1
	}
	return k
}

// own returns block i in a form that may be changed.
func (m *bitmap) own(i int64) *block {
	b := m.blocks[i].Load()
	if b != nil && b != fullBlock {
		return b
	}
	c := m.spare
	m.spare = nil
	if c == nil {
		c = new(block)
	}
	if b == fullBlock {
		c.ones = m.valid(i)
		for j := range c.words {
			c.words[j].Store(^uint64(0))
		}
	}
	m.blocks[i].Store(c)
	return c
}

// settle folds block i back into a pointer when it has become uniform.
func (m *bitmap) settle(i int64, b *block) {
	switch b.ones {
	case 0:
		m.blocks[i].Store(nil)
		if m.shared {
			return
		}
		// Bits past the end may be left over from a full block.
		for j := range b.words {
			b.words[j].Store(0)
		}
		m.spare = b
	case m.valid(i):
		m.blocks[i].Store(fullBlock)
	}
}

// set adds the pages of mask k in word w; k must not reach past the end.
func (m *bitmap) set(w int64, k uint64) {
	i := w / blockWords
	if m.blocks[i].Load() == fullBlock || k == 0 {
		return
	}
	b := m.own(i)
	p := &b.words[w%blockWords]
	old := p.Load()
	n := int64(bits.OnesCount64(k &^ old))
	if n == 0 {
		return
	}
	p.Store(old | k)
	b.ones += n
	m.count += n
	m.settle(i, b)
}

// clear removes the pages of mask k in word w.
func (m *bitmap) clear(w int64, k uint64) {
	i := w / blockWords
	if m.blocks[i].Load() == nil || k == 0 {
		return
	}
	b := m.own(i)
	p := &b.words[w%blockWords]
	old := p.Load()
	n := int64(bits.OnesCount64(k & old))
	if n == 0 {
		return
	}
	p.Store(old &^ k)
	b.ones -= n
	m.count -= n
	m.settle(i, b)
}

func (m *bitmap) ones(i int64) int64 {
	switch b := m.blocks[i].Load(); b {
	case nil:
		return 0
	case fullBlock:
		return m.valid(i)
	default:
		return b.ones
	}
}

// setRange adds n pages from page on, whole blocks at once.
func (m *bitmap) setRange(page, n int64) {
	for end := page + n; page < end; {
		i := page / blockPages
		if page%blockPages == 0 && end-page >= m.valid(i) {
			m.count += m.valid(i) - m.ones(i)
			m.blocks[i].Store(fullBlock)
			page += m.valid(i)
			continue
		}
		w := page / wordPages
		m.set(w, maskOf(w, page, end))
		page = (w + 1) * wordPages
	}
}

// clearRange removes n pages from page on, whole blocks at once.
func (m *bitmap) clearRange(page, n int64) {
	for end := page + n; page < end; {
		i := page / blockPages
		if page%blockPages == 0 && end-page >= m.valid(i) {
			m.count -= m.ones(i)
			m.blocks[i].Store(nil)
			page += m.valid(i)
			continue
		}
		w := page / wordPages
		m.clear(w, maskOf(w, page, end))
		page = (w + 1) * wordPages
	}
}

// reset removes all pages.
func (m *bitmap) reset() {
	if m.count > 0 {
		m.clearRange(0, m.pages)
	}
}

// add adds all pages of o.
func (m *bitmap) add(o *bitmap) {
	for page, n := o.run(0, o.pages); n > 0; page, n = o.run(page+n, o.pages) {
		m.setRange(page, n)
	}
}

// next returns the first page in [from, to) whose bit is want, or to.
func (m *bitmap) next(from, to int64, want bool) int64 {
	for from < to {
		i := from / blockPages
		stop := min(to, (i+1)*blockPages)
		b := m.blocks[i].Load()
		switch b {
		case nil, fullBlock:
			if (b != nil) == want {
				return from
			}
			from = stop
			continue
		}
		for from < stop {
			w := from / wordPages
			v := b.words[w%blockWords].Load()
			if !want {
				v = ^v
			}
			if v &= maskOf(w, from, stop); v != 0 {
				return w*wordPages + int64(bits.TrailingZeros64(v))
			}
			from = (w + 1) * wordPages
		}
		from = stop
	}
	return to
}

// run returns the first run of set pages in [from, to); n is 0 if there is none.
func (m *bitmap) run(from, to int64) (page, n int64) {
	page = m.next(from, to, true)
	if page == to {
		return to, 0
	}
	return page, m.next(page, to, false) - page
}
