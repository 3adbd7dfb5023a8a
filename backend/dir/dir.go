// Package dir is a backend in a directory of chunks: one file for each chunk
// that was written, and a manifest with the size and the chunk size.
//
//	DIR/memferry.json            the manifest
//	DIR/0000000000000c00/0000000000000c05
//	                             chunk 0xc05, in the directory of its 1024
//	                             neighbours
//	DIR/.tmp-…                   a file that is being written
//
// A chunk is replaced by writing a temporary file, fsync, and rename, so a
// crash leaves the old chunk or the new one. The directories that renames and
// removals happened in are synced by Sync. What a crash left half written is
// cleared by the next Open.
//
// One process at a time may write: it holds a lock on the directory (flock(2)),
// which several readers share.
package dir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/chunked"
)

// DefaultChunkSize is the chunk size of a new directory.
const DefaultChunkSize = chunked.DefaultChunkSize

// Options say how a directory is opened. The zero value opens an existing one
// as it is.
type Options struct {
	// Size in bytes. A directory that is missing or empty gets it; one that
	// has another is an error. Zero takes what the manifest says.
	Size int64
	// ChunkSize in bytes, a power of two, in the same way. Zero is
	// DefaultChunkSize for a new directory.
	ChunkSize int64
	// ReadOnly makes every write fail, and changes nothing in the directory.
	ReadOnly bool
	// Parallel is how many chunks one call works on at once; zero is
	// chunked.DefaultParallel.
	Parallel int
}

func (o Options) validate() error {
	if o.Size < 0 || o.Size > memferry.MaxSize {
		return fmt.Errorf("size %d: must be from 0 to %d", o.Size, int64(memferry.MaxSize))
	}
	if o.ChunkSize != 0 {
		return chunked.CheckChunkSize(o.ChunkSize)
	}
	return nil
}

// Open opens the directory at path. One that is missing or empty becomes a new
// backend where o.Size is given.
func Open(path string, o Options) (*chunked.Backend, error) {
	s := &store{path: path, dirs: map[string]struct{}{}}
	b, err := s.open(o)
	if err != nil {
		return nil, errors.Join(err, s.release())
	}
	return b, nil
}

func (s *store) open(o Options) (*chunked.Backend, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", s.path, err)
	}
	if err := s.lock(o); err != nil {
		return nil, err
	}
	if err := s.load(o); err != nil {
		return nil, err
	}
	if !o.ReadOnly {
		if err := s.clearTemporary(); err != nil {
			return nil, err
		}
	}
	b, err := chunked.New(s, s.manifest.Size, s.manifest.ChunkSize, chunked.Options{
		Parallel:    o.Parallel,
		ReadOnly:    o.ReadOnly,
		Close:       s.close,
		Generation:  s.generation,
		BeforeWrite: s.beforeWrite,
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.path, err)
	}
	return b, nil
}

// lock opens the directory, makes it where that is asked for, and takes the
// lock.
func (s *store) lock(o Options) error {
	var err error
	s.dir, err = openDir(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		if o.Size == 0 || o.ReadOnly {
			return fmt.Errorf("open %s: %w; to create it, give its size", s.path, fs.ErrNotExist)
		}
		if err = os.Mkdir(s.path, 0o755); err != nil {
			return err
		}
		if err = syncDir(filepath.Dir(s.path)); err != nil {
			return err
		}
		s.dir, err = openDir(s.path)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%w; for a file, write file:%s", err, s.path)
	}
	if err != nil {
		return err
	}
	how := unix.LOCK_EX
	if o.ReadOnly {
		how = unix.LOCK_SH
	}
	err = flock(s.dir, how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w: another memferry has it open", s.path, memferry.ErrInUse)
	}
	return err
}

// openDir opens nothing but a directory: a FIFO would keep it waiting.
func openDir(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
}

func flock(f *os.File, how int) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := c.Control(func(fd uintptr) { inner = unix.Flock(int(fd), how) }); err != nil {
		return err
	}
	if inner != nil {
		return &fs.PathError{Op: "flock", Path: f.Name(), Err: inner}
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// clearTemporary removes what a crash left.
func (s *store) clearTemporary() error {
	entries, err := os.ReadDir(s.path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), temporary) {
			if err := os.Remove(filepath.Join(s.path, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// release gives up the lock.
func (s *store) release() error {
	if s.dir == nil {
		return nil
	}
	return s.dir.Close()
}

// close makes the generation permanent, where there is a new one, and gives up
// the lock.
func (s *store) close() error { return errors.Join(s.settle(), s.release()) }

// store is the chunks of a directory.
type store struct {
	path string
	dir  *os.File // holds the lock

	// syncing is held by the one that syncs, so that nobody takes an empty
	// dirs for nothing to do while another is still at it.
	syncing sync.Mutex

	mu   sync.Mutex
	dirs map[string]struct{} // with changes that are not synced

	state generations

	manifest manifest
}

var (
	_ chunked.Store      = (*store)(nil)
	_ chunked.RangeStore = (*store)(nil)
	_ chunked.Finder     = (*store)(nil)
	_ chunked.Syncer     = (*store)(nil)
)

func (s *store) generation(context.Context) (string, error) { return s.state.tag(), nil }
