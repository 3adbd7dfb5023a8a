package cli

import (
	"time"

	"github.com/memferry/memferry/region"
)

// mountStatus is what a mount tells of itself.
type mountStatus struct {
	Path     string    `json:"path"` // where it was mounted
	File     string    `json:"file"` // the file itself
	URL      string    `json:"url"`
	Mode     string    `json:"mode"` // "managed" or "direct"
	Frontend string    `json:"frontend"`
	State    string    `json:"state"` // "mounted" or "unmounting"
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	Size     int64     `json:"size"`
	ReadOnly bool      `json:"read_only"`
	Cache    string    `json:"cache,omitempty"`
	// PullRate and PushRate are of late, in bytes per second.
	PullRate int64 `json:"pull_rate"`
	PushRate int64 `json:"push_rate"`
	// Passthrough says that the kernel reads the local file by itself.
	Passthrough bool          `json:"passthrough"`
	Region      *region.Stats `json:"region,omitempty"` // of a managed mount
}

// errorCount is how many background errors there were.
func (s mountStatus) errorCount() int64 {
	var n int64
	if s.Region != nil {
		for _, e := range s.Region.Errors {
			n += e.Count
		}
	}
	return n
}

// unmountSummary is what an unmount, or a sync, came to.
type unmountSummary struct {
	Path    string  `json:"path"`
	Pushed  int64   `json:"pushed_bytes"` // since it was asked for
	Total   int64   `json:"pushed_total_bytes"`
	Left    int64   `json:"dirty_bytes"` // in the cache, to be pushed by the next mount
	Seconds float64 `json:"seconds"`
	Direct  bool    `json:"direct,omitempty"`
	Stale   bool    `json:"stale,omitempty"` // the mount's process was gone already
}
