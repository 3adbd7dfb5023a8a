package nbd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/memferry/memferry"
)

// ErrSyncLost is returned by Sync, once for each loss, after the server has
// restarted while writes that no Sync had covered were acknowledged: it may
// have lost them. So it is after a connection broke to a server that does not
// say whether it has restarted (only memferry's do). Write them again, then
// Sync again.
var ErrSyncLost = errors.New("the connection broke before earlier writes were synced, so they may be lost; write them again")

// losses knows what Sync has to answer for: which acknowledged writes a server
// may have lost. It decides and does no I/O.
//
// Acknowledgements are numbered. Each belongs to an instance, which is what
// holds the write until it is flushed: the export of a server that names it,
// for as long as that process serves it; with others, which may be another
// process after each break, what a single connection leads to. When an instance
// is gone before a FLUSH of its own has covered all that it acknowledged, that
// is a loss. A Sync fails if a loss was counted that no Sync had reported when
// it began. It speaks for everything acknowledged until then, so that what one
// restart does to several connections is reported once, however late some of
// them notice it.
type losses struct {
	mu       sync.Mutex
	named    *instance // the one that is connected to, of a server that names it
	seq      uint64    // of the last acknowledgement
	told     uint64    // those up to here were reported as lost, or covered
	lost     uint64    // how often some were
	reported uint64    // how many of these Sync has returned
}

// instance is something that may lose what it has acknowledged. The mutex of
// losses guards it.
type instance struct {
	name    string // empty: a single connection's
	last    uint64 // its last acknowledgement
	covered uint64 // those up to here are flushed, or counted as lost
}

// enter returns the instance that a new connection leads to; name is empty
// where the server gives none.
func (l *losses) enter(name string) *instance {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.named; old == nil || old.name != name {
		if l.named = nil; name != "" {
			l.named = &instance{name: name}
		}
		if old != nil {
			l.goneLocked(old)
		}
	}
	if name == "" {
		return &instance{}
	}
	return l.named
}

// broke says that a connection to an instance is over.
func (l *losses) broke(i *instance) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i.name == "" {
		l.goneLocked(i)
	}
}

func (l *losses) goneLocked(i *instance) {
	if l.openLocked(i) {
		i.covered = i.last
		l.lost++
	}
}

// openLocked reports whether the instance has acknowledged something that was
// neither flushed nor reported.
func (l *losses) openLocked(i *instance) bool { return i.last > max(i.covered, l.told) }

// mark returns a number that is not smaller than that of any acknowledgement.
func (l *losses) mark() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seq
}

// answered notes a request that an instance has carried out.
func (l *losses) answered(i *instance, k *call) {
	if !k.req.modifies() && k.req.typ != cmdFlush {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.req.typ == cmdFlush {
		i.covered = max(i.covered, k.mark)
		return
	}
	l.seq++
	i.last = l.seq
	if i.name != "" && i != l.named { // of a connection that is late to break
		l.goneLocked(i)
	}
}

// syncing is one Sync: it began when seen losses had been reported and mark
// writes were acknowledged.
type syncing struct{ seen, mark uint64 }

func (l *losses) begin() syncing {
	l.mu.Lock()
	defer l.mu.Unlock()
	return syncing{l.reported, l.seq}
}

// report tells whether a Sync has to fail, and takes note that it does.
func (l *losses) report(s syncing) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost <= s.seen {
		return false
	}
	l.reported = l.lost
	l.told = max(l.told, s.mark)
	return true
}

// unreported tells whether the next Sync is to fail.
func (l *losses) unreported() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lost > l.reported
}

// open returns those instances that hold something which is not covered.
func (l *losses) open(of []*instance) []*instance {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(of, func(i *instance) bool { return !l.openLocked(i) })
}

// Sync implements memferry.Backend by FLUSH. See ErrSyncLost. Where the server
// has no FLUSH it promises nothing, and Sync has nothing to add.
func (c *Client) Sync() error {
	if c.ctx.Err() != nil {
		return memferry.ErrClosed
	}
	s := c.losses.begin()
	if c.losses.report(s) {
		return c.syncLost()
	}
	if !c.info.Flags.Has(FlagSendFlush) {
		return nil
	}
	deadline := time.Now().Add(c.opt.IOTimeout)
	for {
		on := c.open()
		if len(on) == 0 {
			on = []*instance{nil} // one for all
		}
		err := parallel(int64(len(on)), func(n int64) error {
			return c.request(context.Background(), request{typ: cmdFlush}, func(k *call) { k.on, k.deadline = on[n], deadline }, nil)
		})
		// Also after success: it may be that of a server that has restarted
		// since the writes.
		if c.losses.report(s) {
			return c.syncLost()
		}
		// A connection that broke is no loss if the server is the same, or
		// another Sync has covered its writes: what is left is asked again.
		if !errors.Is(err, errConnLost) {
			return err
		}
	}
}

func (c *Client) syncLost() error { return fmt.Errorf("nbd: %s: %w", c.uri, ErrSyncLost) }

// open returns the connected instances that have something to flush. The FLUSH
// of another one does not cover it.
func (c *Client) open() []*instance {
	c.mu.Lock()
	var all []*instance
	for _, cc := range c.conns {
		if cc != nil && !slices.Contains(all, cc.instance) {
			all = append(all, cc.instance)
		}
	}
	c.mu.Unlock()
	return c.losses.open(all)
}
