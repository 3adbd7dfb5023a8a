package fuse

import (
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"

	"github.com/memferry/memferry"
)

const (
	// DefaultName is the file's name in a directory when none is given.
	DefaultName = "memferry"

	// maxName bounds a file's name (NAME_MAX of limits.h).
	maxName = 255

	// maxRequest is the longest read or write the kernel may send, in bytes.
	// It is what fs.fuse.max_pages_limit allows by default.
	maxRequest = 1 << 20

	// maxBackground bounds the reads ahead and the asynchronous requests the
	// kernel sends before it waits for answers. What is in flight to a backend
	// is limited by arenaSlots or regionSlots as well.
	maxBackground = 32

	// congestionThreshold is where the kernel drops further read-ahead.
	congestionThreshold = maxBackground - 4

	// maxPendingInput bounds the memory for requests being received and
	// written, in bytes.
	maxPendingInput = 16 << 20
)

// Options adjust a mount. The zero value works.
type Options struct {
	// Name is the file's name in a directory; empty means DefaultName.
	Name string
	// ReadOnly refuses writes with EROFS. A backend that refuses them makes
	// the mount read-only by itself.
	ReadOnly bool
	// AllowOther lets other users in, as far as Mode lets them. Without root
	// this needs user_allow_other in /etc/fuse.conf.
	AllowOther bool
	// Mode is the file's permissions; 0 means 0644, or 0555 when read-only, so
	// that a program can be executed from the mount.
	Mode fs.FileMode
	// ReadAhead is how far the kernel reads ahead, in bytes, where it lets us
	// set it (as root); 0 means 4 MiB.
	ReadAhead int64
	// Uncached has every read and write of an application reach the backend at
	// once, instead of the kernel's page cache. It is for a backend whose bytes
	// change in other ways too. A mapping still sees what the kernel has cached
	// for it, and its writes reach the backend as with the cache.
	Uncached bool
	// NoPassthrough keeps every read going through the backend.
	NoPassthrough bool
	// NoHelper never mounts through fusermount3.
	NoHelper bool
	// Logger receives what can't be returned; nil discards.
	Logger *slog.Logger
}

const defaultReadAhead = 4 << 20

// withDefaults returns o with zero values replaced, or what is wrong with it.
func (o Options) withDefaults(caps memferry.Capabilities) (Options, error) {
	if o.Name == "" {
		o.Name = DefaultName
	}
	o.Name = strings.ReplaceAll(strings.Trim(o.Name, "/"), "/", "-")
	if o.Name == "" || o.Name == "." || o.Name == ".." || len(o.Name) > maxName || strings.ContainsRune(o.Name, 0) {
		return o, fmt.Errorf("file name %q: choose another", o.Name)
	}
	o.ReadOnly = o.ReadOnly || caps.ReadOnly
	if o.Mode&^fs.ModePerm != 0 {
		return o, fmt.Errorf("mode %v: only permission bits can be set", o.Mode)
	}
	if o.Mode == 0 {
		o.Mode = 0o644
		if o.ReadOnly {
			o.Mode = 0o555
		}
	}
	if o.ReadAhead < 0 {
		return o, fmt.Errorf("read-ahead of %d bytes: must not be negative", o.ReadAhead)
	}
	if o.ReadAhead == 0 {
		o.ReadAhead = defaultReadAhead
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// residentViewer is how a region offers what is already local without a copy:
// false where any of it is absent. ReleaseView follows once after true.
type residentViewer interface {
	View(off, n int64) ([]byte, bool)
	ReleaseView()
}

// residentFile is how a region offers the file that holds its local copy.
type residentFile interface {
	// LocalFile may return nil.
	LocalFile() *os.File
	// Complete reports whether every byte of the file is valid.
	Complete() bool
	// Resident reports whether n bytes at off are.
	Resident(off, n int64) bool
}
