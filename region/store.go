package region

import "github.com/memferry/memferry/internal/chunk"

// Change is a run of pages and the state they are in.
type Change = chunk.Change

// PageState is what a [Store] remembers of a page.
type PageState = chunk.PageState

// The states of a [Change].
const (
	Absent  = chunk.Absent
	Present = chunk.Present
	Dirty   = chunk.Dirty
)

// Store remembers, across restarts, which pages of the local backend can be
// trusted. The region calls Load once, before anything else. Intend may be
// called by many goroutines at once and while a Commit runs; calls of Commit,
// SetGeneration and SetRemoteSession do not overlap.
//
// The order that makes a crash harmless: data reaches the local medium (Sync
// of the local backend) before Commit says that it is there, and Intend says
// that a page may differ from the remote before it does.
type Store interface {
	// Load passes every run of present pages to fn, in ascending order, runs
	// not overlapping; dirty ones were not pushed, or may not have been.
	Load(fn func(page, n int64, dirty bool) error) error
	// Intend records that n pages may be changed from now on. It must survive
	// the end of this process (not of the machine) once it has returned, and is
	// cheap. A page that Load would report as present is reported as dirty
	// afterwards, until a Commit that began later says otherwise; an intent on
	// an absent page has no effect.
	Intend(page, n int64) error
	// Commit makes the changes durable, all or none, in order.
	Commit(changes []Change) error
	// Generation is the remote's tag that the cache matches, "" if unknown.
	// pushing means that our own pushes may have changed the tag since.
	Generation() (tag string, pushing bool)
	// SetGeneration records both, durably.
	SetGeneration(tag string, pushing bool) error
	// RemoteSession is the session (see [memferry.Fencer]) in whose name the
	// remote was last written to, "" if there is none.
	RemoteSession() string
	// SetRemoteSession records it, durably, before anything is written in its
	// name.
	SetRemoteSession(session string) error
	// Close marks a clean shutdown and releases the store.
	Close() error
}
