// Package gate counts the users of something that must not be released under
// them.
package gate

import (
	"sync"
	"sync/atomic"
)

// shut is added to the count of a closed gate. It is far from both ends, so
// that no number of users changes its sign.
const shut = -1 << 62

// Gate lets users in until it is closed, and tells when the last one left.
// Entering and leaving cost one atomic addition each. The zero value is an
// open gate.
type Gate struct {
	users atomic.Int64 // those inside; plus shut once closed
	once  sync.Once
	idle  chan struct{} // closed when shut and empty
	init  sync.Once
}

// Enter reports whether the gate is open; if so, the caller is inside and must
// call Leave once.
func (g *Gate) Enter() bool {
	if g.users.Add(1) > 0 {
		return true
	}
	g.Leave()
	return false
}

// Leave ends one stay.
func (g *Gate) Leave() {
	if g.users.Add(-1) == shut {
		g.once.Do(func() { close(g.idleChan()) })
	}
}

// Shut closes the gate for those to come, and reports whether it was open.
func (g *Gate) Shut() bool {
	for {
		n := g.users.Load()
		if n < 0 {
			return false
		}
		if g.users.CompareAndSwap(n, n+shut) {
			if n == 0 {
				g.once.Do(func() { close(g.idleChan()) })
			}
			return true
		}
	}
}

// Closed reports whether the gate was shut.
func (g *Gate) Closed() bool { return g.users.Load() < 0 }

// Idle returns a channel that is closed once the gate is shut and nobody is
// inside.
func (g *Gate) Idle() <-chan struct{} { return g.idleChan() }

func (g *Gate) idleChan() chan struct{} {
	g.init.Do(func() { g.idle = make(chan struct{}) })
	return g.idle
}
