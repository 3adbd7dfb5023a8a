package region

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/size"
)

const (
	// generationPoll is how often the remote is asked whether it is still the
	// same.
	generationPoll = 10 * time.Second

	// generationSettle is how long no push must have happened for the remote's
	// tag to be taken as that of our own writes.
	generationSettle = 2 * time.Second
)

// generation watches whether somebody else changes the remote. Our own pushes
// change its tag too: between the first one and the next look at rest, a new
// tag proves nothing, and is adopted. The region's mutex guards the fields.
type generation struct {
	ask    memferry.Generationer // nil where the remote has no tags
	tag    string                // of the content that the local copy matches
	own    bool                  // our pushes may have changed it since
	rounds int64                 // pushes begun
	active bool                  // one has begun, and may have sent something
	pushed time.Time             // the last of them
	wake   chan struct{}
}

// check has the loop look now.
func (g *generation) check() {
	if g.ask == nil {
		return
	}
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// openGeneration makes sure that nobody but us changes the remote any more, and
// compares it with what the cache was filled from.
func (r *Region) openGeneration(ctx context.Context) error {
	r.gen.wake = make(chan struct{}, 1)
	ctx, cancel := context.WithTimeout(ctx, r.o.IOTimeout)
	defer cancel()
	if err := r.fence(ctx); err != nil {
		return err
	}
	if r.remote.can.Generationer == nil {
		return nil
	}
	tag, err := r.remote.can.Generationer.Generation(ctx)
	if err != nil && !errors.Is(err, memferry.ErrNotSupported) {
		return fmt.Errorf("ask the remote for its generation: %w", err)
	}
	if tag == "" {
		return nil
	}
	r.gen.ask, r.gen.tag = r.remote.can.Generationer, tag
	if r.o.Store == nil {
		return nil
	}
	// After a fence the tag that our own pushes have led to is the last one
	// that they lead to.
	if known, pushing := r.o.Store.Generation(); known != "" && known != tag && !pushing {
		return r.changedError(known, tag)
	}
	return wrap("record the remote's generation", r.o.Store.SetGeneration(tag, false))
}

// fence ends the requests of the process that used the cache before, if they
// may still be under way: one that is carried out after newer ones would bring
// old bytes back, and one that is carried out after the generation was asked
// for would pass for a change by somebody else. See
// docs/adr/0004-write-fence.md.
func (r *Region) fence(ctx context.Context) error {
	f := r.remote.can.Fencer
	if f == nil || r.o.Store == nil {
		return nil
	}
	session := f.Session()
	if last := r.o.Store.RemoteSession(); last != "" && last != session {
		if err := f.Fence(ctx, last); err != nil {
			return fmt.Errorf("end the requests of the last mount: %w", err)
		}
	}
	return wrap("record the session with the remote", r.o.Store.SetRemoteSession(session))
}

func (r *Region) changedError(old, now string) error {
	if r.o.Store == nil {
		return fmt.Errorf("the remote is no longer what was mounted (generation %s, now %s): %w; unmount and mount again", old, now, memferry.ErrChanged)
	}
	lost := ""
	if c := r.table.Counts(); c.Dirty > 0 {
		lost = fmt.Sprintf(" (it has up to %s that were not pushed)", size.Format(r.bytes(c.Dirty)))
	}
	return fmt.Errorf("the remote is no longer what was cached (generation %s, now %s): %w; choose another --cache directory, or delete this one%s",
		old, now, memferry.ErrChanged, lost)
}

// setChangedLocked stops all use of the remote for good.
func (r *Region) setChangedLocked(err error) {
	r.changed = err
	r.errorLocked(ErrorChanged, err)
	r.wakeAllLocked()
	r.push.kick()
}

// generationLoop looks at the remote now and then, and after an outage.
func (r *Region) generationLoop() {
	tick := time.NewTicker(generationPoll)
	defer tick.Stop()
	settle := time.NewTicker(generationSettle)
	defer settle.Stop()
	for {
		select {
		case <-tick.C:
			r.checkGeneration()
		case <-r.gen.wake:
			r.checkGeneration()
		case <-settle.C:
			r.mu.Lock()
			rest := r.gen.own && time.Since(r.gen.pushed) >= generationSettle
			r.mu.Unlock()
			if rest {
				r.settleGeneration()
			}
		case <-r.ctx.Done():
			return
		}
	}
}

// askGeneration returns the remote's tag.
func (r *Region) askGeneration() (string, error) {
	ctx, cancel := context.WithTimeout(memferry.WithClass(r.ctx, memferry.ClassDemand), r.o.IOTimeout)
	defer cancel()
	tag, err := r.gen.ask.Generation(ctx)
	if err != nil {
		return "", fmt.Errorf("ask the remote for its generation: %w", err)
	}
	return tag, nil
}

// checkGeneration notices that somebody else has changed the remote.
func (r *Region) checkGeneration() {
	r.mu.Lock()
	own, known := r.gen.own, r.gen.tag
	r.mu.Unlock()
	if own {
		return
	}
	tag, err := r.askGeneration()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		if r.ctx.Err() == nil {
			r.remoteFailedLocked(err)
		}
		return // other requests notice an outage, and end it
	}
	if tag != "" && tag != known && !r.gen.own && r.gen.tag == known && r.changed == nil {
		r.setChangedLocked(r.changedError(known, tag))
	}
}

// beginPushGeneration makes sure that the remote is still ours to change, and
// has the cache know that its tag will differ.
func (r *Region) beginPushGeneration() error {
	if r.gen.ask == nil {
		return nil
	}
	r.mu.Lock()
	r.gen.rounds, r.gen.active = r.gen.rounds+1, true
	r.gen.pushed = time.Now()
	own, known, changed := r.gen.own, r.gen.tag, r.changed
	r.mu.Unlock()
	if changed != nil {
		return changed
	}
	if own {
		return nil
	}
	tag, err := r.askGeneration()
	if err != nil {
		return err
	}
	if tag != "" && tag != known {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.gen.tag != known { // Invalidate has adopted another meanwhile
			return fmt.Errorf("the remote's generation was just renewed: %w", memferry.ErrTimeout)
		}
		err := r.changedError(known, tag)
		r.setChangedLocked(err)
		return err
	}
	if err := r.storeGeneration(known, true); err != nil {
		return err
	}
	r.mu.Lock()
	r.gen.own = true
	r.mu.Unlock()
	return nil
}

// settleGeneration adopts the tag that our own pushes have led to, unless
// another push has begun meanwhile.
func (r *Region) settleGeneration() {
	if r.gen.ask == nil {
		return
	}
	r.mu.Lock()
	c := r.table.Counts()
	// A push that has begun, with nothing to send yet, sends what is written
	// while the remote is being asked.
	rest := !r.gen.active && c.Dirty+c.Pushing+c.Unsynced == 0
	rounds, own := r.gen.rounds, r.gen.own && rest && r.changed == nil
	r.mu.Unlock()
	if !own {
		return
	}
	tag, err := r.askGeneration()
	if err != nil || tag == "" {
		return // tried again
	}
	// Under the store's lock, so that a push that begins now says so after us.
	r.commitTurn <- struct{}{}
	defer func() { <-r.commitTurn }()
	r.mu.Lock()
	same := r.gen.rounds == rounds
	if same {
		r.gen.tag, r.gen.own = tag, false
	}
	r.mu.Unlock()
	if !same || r.o.Store == nil {
		return
	}
	if err := r.o.Store.SetGeneration(tag, false); err != nil {
		r.noteError(ErrorStore, fmt.Errorf("record the remote's generation: %w", err))
	}
}

func (r *Region) storeGeneration(tag string, pushing bool) error {
	if r.o.Store == nil {
		return nil
	}
	r.commitTurn <- struct{}{}
	defer func() { <-r.commitTurn }()
	return wrap("record the remote's generation", r.o.Store.SetGeneration(tag, pushing))
}
