package region

import "time"

// Stats is one consistent snapshot of a region. Counts are in bytes unless
// they say otherwise.
type Stats struct {
	Size      int64 `json:"size"`
	ChunkSize int64 `json:"chunk_size"`

	Present  int64 `json:"present"`  // local, dirty or not
	Dirty    int64 `json:"dirty"`    // to be pushed, Pushing not included
	Fetching int64 `json:"fetching"` // requested from the remote
	Pushing  int64 `json:"pushing"`  // sent, and not yet accepted

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
