package file

import (
	"sync"
	"time"
)

// knownFor bounds how long a run of data is remembered: somebody else may
// punch holes into the file.
const knownFor = time.Second

// knownData remembers the last run of data that was found. To find the end of
// one, some filesystems look at each of its pages (on tmpfs, SEEK_HOLE takes a
// millisecond for 100 MiB), so that asking for a large file range by range
// would take the square of its size.
//
// What is remembered may lag behind a hole that was made meanwhile by somebody
// else, and then calls it data. That is always allowed.
type knownData struct {
	mu       sync.Mutex
	off, end int64
	at       time.Time
	changes  int64 // holes made by this backend
}

// find returns where the run of data that off lies in ends, if it is known,
// and otherwise what to pass to found.
func (k *knownData) find(off int64) (end int64, changes int64, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if off < k.off || off >= k.end || time.Since(k.at) >= knownFor {
		return 0, k.changes, false
	}
	return k.end, k.changes, true
}

// found remembers a run, unless holes were made since find was called.
func (k *knownData) found(off, end, changes int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if changes == k.changes {
		k.off, k.end, k.at = off, end, time.Now()
	}
}

// forget is called once a hole was made.
func (k *knownData) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.changes++
	k.end = k.off
}
