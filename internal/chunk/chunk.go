// Package chunk is the table of a region: which of its pages are local, which
// differ from the remote, and which are on their way.
//
// It is pure: it decides, others move the bytes. Nothing here does I/O, waits
// or knows of time, so its behaviour can be tested exhaustively.
package chunk

// PageState is what a cache remembers of a page.
type PageState uint8

const (
	// Absent pages are only at the remote.
	Absent PageState = iota
	// Present pages are local, and equal to the remote's as far as is known.
	Present
	// Dirty pages are local, and the remote does not have them yet.
	Dirty
)

func (s PageState) String() string {
	switch s {
	case Absent:
		return "absent"
	case Present:
		return "present"
	case Dirty:
		return "dirty"
	}
	return "unknown"
}

// Change says that the N pages from Page on are now in State.
type Change struct {
	Page, N int64
	State   PageState
}
