package region

import (
	"context"
	"fmt"
	"time"

	"github.com/memferry/memferry"
)

// commitInterval is how often what was pulled is recorded in the Store, so
// that a crash costs no more than that.
const commitInterval = 2 * time.Second

// Sync makes every write that was acknowledged before the call durable: on the
// local medium and in the Store, or, with DurabilityRemote, at the remote as
// well.
func (r *Region) Sync() error {
	if r.closed.Load() {
		return memferry.ErrClosed
	}
	if r.o.Durability == DurabilityRemote && !r.o.ReadOnly {
		if err := r.pushAll(context.Background()); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
	}
	if r.o.Store != nil {
		return r.commit()
	}
	if err := r.local.Sync(); err != nil {
		err = fmt.Errorf("sync the local copy: %w", localError(err))
		r.noteError(ErrorSync, err)
		return err
	}
	return nil
}

// commitLoop records in the Store what the background work has changed.
func (r *Region) commitLoop() {
	tick := time.NewTicker(commitInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-r.commitWake:
		case <-r.ctx.Done():
			return
		}
		r.mu.Lock()
		need := r.table.NeedsCommit()
		r.mu.Unlock()
		if need {
			_ = r.commit() // counted, and tried again
		}
	}
}

func (r *Region) kickCommit() {
	select {
	case r.commitWake <- struct{}{}:
	default:
	}
}

// commit makes the local data durable and then records the state of its pages.
func (r *Region) commit() error {
	r.commitTurn <- struct{}{}
	defer func() { <-r.commitTurn }()
	r.mu.Lock()
	r.table.BeginCommit()
	r.mu.Unlock()
	err := r.commitStaged()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.table.EndCommit(err == nil)
	r.wakeAllLocked() // writers wait for pages that were being recorded as clean
	return err
}

func (r *Region) commitStaged() error {
	if err := r.local.Sync(); err != nil {
		err = fmt.Errorf("sync the local copy: %w", localError(err))
		r.noteError(ErrorSync, err)
		return err
	}
	r.mu.Lock()
	changes := r.table.Commit()
	r.mu.Unlock()
	if len(changes) == 0 {
		return nil
	}
	if err := r.o.Store.Commit(changes); err != nil {
		err = fmt.Errorf("record the state of the cache: %w", localError(err))
		r.noteError(ErrorStore, err)
		return err
	}
	return nil
}
