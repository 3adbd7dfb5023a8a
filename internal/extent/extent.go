// Package extent puts together the answer of a memferry.Extenter.
package extent

import "github.com/memferry/memferry"

// Hole are the flags of a range without storage.
const Hole = memferry.ExtentHole | memferry.ExtentZero

// List collects extents in ascending order, neighbours of one kind joined.
type List struct {
	Extents []memferry.Extent
	off     int64 // where the next one starts
	end     int64 // which none passes
}

// New returns a list for [off, end).
func New(off, end int64) *List { return &List{off: off, end: end} }

// Next returns where the next extent starts; the end once all is covered.
func (l *List) Next() int64 { return l.off }

// Add says that all up to to is of one kind. What lies past the end is left
// out, and a to that has been passed adds nothing.
func (l *List) Add(to int64, flags memferry.ExtentFlags) {
	to = min(to, l.end)
	if to <= l.off {
		return
	}
	if i := len(l.Extents) - 1; i >= 0 && l.Extents[i].Flags == flags {
		l.Extents[i].Len += to - l.off
	} else {
		l.Extents = append(l.Extents, memferry.Extent{Off: l.off, Len: to - l.off, Flags: flags})
	}
	l.off = to
}
