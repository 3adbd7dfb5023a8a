package region

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/memferry/memferry"
)

// Stats is one consistent snapshot of a region. Counts are in bytes unless
// they say otherwise.
type Stats struct {
	Size      int64 `json:"size"`
	ChunkSize int64 `json:"chunk_size"`

	Present  int64 `json:"present"`  // local, dirty or not
	Dirty    int64 `json:"dirty"`    // to be pushed, Pushing not included
	Fetching int64 `json:"fetching"` // requested from the remote
	Pushing  int64 `json:"pushing"`  // sent, and not yet accepted
	Unsynced int64 `json:"unsynced"` // accepted, and not yet synced by the remote

	PulledBytes  int64 `json:"pulled_bytes"`  // moved from the remote, holes not included
	SkippedBytes int64 `json:"skipped_bytes"` // settled as zero without a transfer
	PushedBytes  int64 `json:"pushed_bytes"`  // accepted by the remote
	DroppedBytes int64 `json:"dropped_bytes"` // fetched, and overtaken by a write

	DemandReads int64 `json:"demand_reads"` // requests for what an application waited for
	DemandWaits int64 `json:"demand_waits"` // reads that had to wait for the remote

	InFlight int64         `json:"in_flight"` // of background pulls
	Window   int64         `json:"window"`    // how much of that the link is thought to carry
	RTT      time.Duration `json:"rtt_ns"`    // smallest of late, 0 if unknown
	Rate     int64         `json:"rate"`      // delivery, bytes per second, 0 if unknown

	PullComplete bool   `json:"pull_complete"`
	RemoteUp     bool   `json:"remote_up"`
	Changed      bool   `json:"changed"` // the remote is no longer the one opened
	Generation   string `json:"generation,omitempty"`

	Errors []ErrorStat `json:"errors,omitempty"` // by kind, in the order of ErrorKind
}

// ErrorKind groups the errors that a region counts.
type ErrorKind string

// The kinds of errors.
const (
	ErrorDemand  ErrorKind = "demand"  // a read's fetch failed
	ErrorPull    ErrorKind = "pull"    // a background fetch failed
	ErrorPush    ErrorKind = "push"    // the remote refused a write
	ErrorSync    ErrorKind = "sync"    // a Sync failed, local or remote
	ErrorLocal   ErrorKind = "local"   // the local backend failed
	ErrorStore   ErrorKind = "store"   // presence could not be recorded
	ErrorChanged ErrorKind = "changed" // the remote changed under the region
)

// ErrorStat counts the errors of one kind.
type ErrorStat struct {
	Kind  ErrorKind `json:"kind"`
	Count int64     `json:"count"`
	Last  string    `json:"last"`
	Time  time.Time `json:"time"`
}

// counters are the parts of Stats that nothing else keeps.
type counters struct {
	pulled, skipped, pushed, dropped int64
	demandReads, demandWaits         int64
}

// errorKinds lists them in the order of Stats.Errors.
var errorKinds = [...]ErrorKind{ErrorDemand, ErrorPull, ErrorPush, ErrorSync, ErrorLocal, ErrorStore, ErrorChanged}

const numErrorKinds = len(errorKinds)

type errorCount struct {
	n    int64
	last error
	time time.Time
}

// noteError counts an error and logs it.
func (r *Region) noteError(kind ErrorKind, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errorLocked(kind, err)
}

// logPause is how often one kind of error is logged at most.
const logPause = time.Second

func (r *Region) errorLocked(kind ErrorKind, err error) {
	i := slices.Index(errorKinds[:], kind)
	e := &r.errs[i]
	now := time.Now()
	e.n++
	e.last = err
	if now.Sub(e.time) >= logPause {
		r.o.Logger.Warn("region: "+string(kind)+" failed", "err", err, "count", e.n)
	}
	e.time = now
}

func (r *Region) remoteUpLocked() {
	if !r.up {
		r.up = true
		r.o.Logger.Info("region: remote is back")
		r.gen.check()
	}
	r.pull.recoveredLocked()
}

// remoteFailedLocked notes that the remote failed, unless it merely refused.
func (r *Region) remoteFailedLocked(err error) {
	if errors.Is(err, memferry.ErrChanged) && r.changed == nil {
		r.setChangedLocked(err)
	}
	if transient(err) {
		r.up = false
	}
}

// fullPause is how long a full local medium is left alone.
const fullPause = time.Second

func (r *Region) noteFullLocked(err error) {
	if errors.Is(err, memferry.ErrNoSpace) {
		r.full.until = time.Now().Add(fullPause)
	}
}

// localError gives a full medium the name that callers look for.
func localError(err error) error {
	if errors.Is(err, syscall.ENOSPC) && !errors.Is(err, memferry.ErrNoSpace) {
		return fmt.Errorf("%w: %w", memferry.ErrNoSpace, err)
	}
	return err
}

// Stats returns a snapshot.
func (r *Region) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.table.Counts()
	s := Stats{
		Size: r.size, ChunkSize: r.o.ChunkSize,
		Present: r.bytes(c.Present), Dirty: r.bytes(c.Dirty), Unsynced: r.bytes(c.Unsynced),
		Fetching: r.bytes(c.Fetching + c.Landing), Pushing: r.bytes(c.Pushing),
		PulledBytes: r.count.pulled, SkippedBytes: r.count.skipped,
		PushedBytes: r.count.pushed, DroppedBytes: r.count.dropped,
		DemandReads: r.count.demandReads, DemandWaits: r.count.demandWaits,
		InFlight: r.pull.pace.inFlight, Window: r.pull.pace.window,
		RTT: r.pull.pace.rtt, Rate: int64(r.pull.pace.rate()),
		PullComplete: r.complete.Load(), RemoteUp: r.up, Changed: r.changed != nil,
		Generation: r.gen.tag,
	}
	for i, e := range r.errs {
		if e.n > 0 {
			s.Errors = append(s.Errors, ErrorStat{errorKinds[i], e.n, e.last.Error(), e.time})
		}
	}
	return s
}
