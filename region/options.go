package region

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/memferry/memferry"
)

// PullMode says what a region fetches that nobody has asked for yet.
type PullMode uint8

const (
	// PullFull fetches everything, in the background.
	PullFull PullMode = iota
	// PullDemand fetches what is read, and ahead of sequential reads.
	PullDemand
	// PullNone fetches exactly the pages that are read.
	PullNone
)

func (m PullMode) String() string {
	switch m {
	case PullFull:
		return "full"
	case PullDemand:
		return "demand"
	case PullNone:
		return "none"
	}
	return "unknown"
}

// ParsePullMode is the inverse of [PullMode.String].
func ParsePullMode(s string) (PullMode, error) {
	for m := PullFull; m <= PullNone; m++ {
		if m.String() == s {
			return m, nil
		}
	}
	return 0, fmt.Errorf("pull mode %q: want full, demand or none", s)
}

// Durability says what a Sync of the region promises.
type Durability uint8

const (
	// DurabilityLocal makes Sync wait for the local medium (and its Store).
	DurabilityLocal Durability = iota
	// DurabilityRemote makes it also push, and wait for the remote's Sync.
	DurabilityRemote
)

func (d Durability) String() string {
	switch d {
	case DurabilityLocal:
		return "local"
	case DurabilityRemote:
		return "remote"
	}
	return "unknown"
}

// ParseDurability is the inverse of [Durability.String].
func ParseDurability(s string) (Durability, error) {
	for d := DurabilityLocal; d <= DurabilityRemote; d++ {
		if d.String() == s {
			return d, nil
		}
	}
	return 0, fmt.Errorf("durability %q: want local or remote", s)
}

// Defaults and limits of [Options].
const (
	DefaultChunkSize    = 256 << 10
	MinChunkSize        = memferry.PageSize
	MaxChunkSize        = 16 << 20
	DefaultPushInterval = time.Second
	DefaultPushIdle     = 200 * time.Millisecond
	DefaultPushBacklog  = 64 << 20
	DefaultIOTimeout    = 30 * time.Second
)

// Options adjust a region. The zero value works.
type Options struct {
	// ChunkSize is the unit of transfer, in bytes: a power of two, from
	// MinChunkSize to MaxChunkSize. 0 means DefaultChunkSize.
	ChunkSize int64
	// Pull says what is fetched beyond what is read.
	Pull PullMode
	// PushInterval bounds how long a write waits before it is pushed. 0 means
	// DefaultPushInterval, a negative value pushes only on Push, on Sync with
	// DurabilityRemote, and on Close.
	PushInterval time.Duration
	// PushIdle starts a push once no write came for this long. 0 means
	// DefaultPushIdle, negative turns it off.
	PushIdle time.Duration
	// PushBacklog starts a push once this many bytes are dirty. 0 means
	// DefaultPushBacklog, negative turns it off.
	PushBacklog int64
	// Durability is what Sync promises.
	Durability Durability
	// Rate bounds background pulls, in bytes per second; 0 means no bound.
	Rate int64
	// IOTimeout is how long a read waits for the remote through errors and
	// outages before it fails, and how long Close tries to push. 0 means
	// DefaultIOTimeout.
	IOTimeout time.Duration
	// ReadOnly refuses writes.
	ReadOnly bool
	// Priority ranks chunks for the background pull: higher first, equal ones
	// in ascending order. It must be a pure function of the chunk: it is called
	// from another goroutine, though never concurrently, and again for a chunk
	// that is still absent when the chunks are ranked anew, which is so after a
	// failed fetch and in regions of many chunks. nil means the same for all.
	Priority func(chunk int64) int
	// Store remembers presence and dirtiness across restarts; nil means that
	// the local backend is volatile.
	Store Store
	// Logger receives background errors and changes of state; nil discards.
	Logger *slog.Logger
}

// withDefaults returns o with zero values replaced, or what is wrong with it.
func (o Options) withDefaults() (Options, error) {
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	if o.ChunkSize < MinChunkSize || o.ChunkSize > MaxChunkSize || o.ChunkSize&(o.ChunkSize-1) != 0 {
		return o, fmt.Errorf("chunk size %d: want a power of two from %d to %d", o.ChunkSize, MinChunkSize, MaxChunkSize)
	}
	if o.Pull > PullNone {
		return o, fmt.Errorf("pull mode %d: unknown", o.Pull)
	}
	if o.Durability > DurabilityRemote {
		return o, fmt.Errorf("durability %d: unknown", o.Durability)
	}
	if o.Rate < 0 {
		return o, fmt.Errorf("rate %d: want bytes per second, or 0 for no bound", o.Rate)
	}
	if o.IOTimeout < 0 {
		return o, fmt.Errorf("I/O timeout %v: want a positive duration", o.IOTimeout)
	}
	if o.PushInterval == 0 {
		o.PushInterval = DefaultPushInterval
	}
	if o.PushIdle == 0 {
		o.PushIdle = DefaultPushIdle
	}
	if o.PushBacklog == 0 {
		o.PushBacklog = DefaultPushBacklog
	}
	if o.IOTimeout == 0 {
		o.IOTimeout = DefaultIOTimeout
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}
