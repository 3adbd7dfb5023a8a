package dir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

const (
	// temporary is what the names of files being written start with.
	temporary = ".tmp-"
	// fanOut is how many chunks share a directory, so that none gets too many
	// entries and a hole of that many chunks is seen at once.
	fanOut = 1024
)

// place returns the path of the directory that chunk index is in, and that of
// its file.
func (s *store) place(index int64) (dir, file string) {
	dir = filepath.Join(s.path, fmt.Sprintf("%016x", index/fanOut*fanOut))
	return dir, filepath.Join(dir, fmt.Sprintf("%016x", index))
}

// Get reads a chunk's file.
func (s *store) Get(ctx context.Context, index int64, p []byte) (int, error) {
	return s.GetRange(ctx, index, 0, p)
}

// GetRange reads a part of a chunk's file, whose length it checks.
func (s *store) GetRange(ctx context.Context, index, off int64, p []byte) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	_, path := s.place(index)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := s.checkLength(f, index); err != nil {
		return 0, err
	}
	n, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%s: cut off while it was read: %w", path, memferry.ErrCorrupt)
	}
	return n, err
}

func (s *store) checkLength(f *os.File, index int64) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	want := min(s.manifest.ChunkSize, s.manifest.Size-index*s.manifest.ChunkSize)
	if st.Size() != want {
		return fmt.Errorf("%s: has %d bytes, must have %d: %w", f.Name(), st.Size(), want, memferry.ErrCorrupt)
	}
	return nil
}

// Put writes a chunk's file anew.
func (s *store) Put(ctx context.Context, index int64, p []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	dir, path := s.place(index)
	err := s.replace(path, p)
	if errors.Is(err, fs.ErrNotExist) { // the first of its directory
		if err = os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return noSpace(err)
		}
		s.changed(s.path)
		err = s.replace(path, p)
	}
	if err != nil {
		return err
	}
	s.changed(dir)
	return nil
}

// replace puts a file with content p at path, atomically.
func (s *store) replace(path string, p []byte) error {
	f, err := os.CreateTemp(s.path, temporary)
	if err != nil {
		return noSpace(err)
	}
	_, err = f.Write(p)
	if err == nil {
		// Before the rename: the name must not reach the disk before the data.
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return noSpace(errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", memferry.ErrNoSpace, err)
	}
	return err
}

// Delete removes a chunk's file.
func (s *store) Delete(ctx context.Context, index int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	dir, path := s.place(index)
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	s.changed(dir)
	return nil
}

// Find looks for the file of index alone, and skips directories that are not
// there.
func (s *store) Find(ctx context.Context, index, end int64) (int64, bool, error) {
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	dir, path := s.place(index)
	_, err := os.Lstat(path)
	if err == nil {
		return index, true, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return 0, false, err
	}
	_, err = os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return min(end, index/fanOut*fanOut+fanOut), false, nil
	}
	return index + 1, false, err
}

// changed notes a change, and that its directory must be synced.
func (s *store) changed(dir string) {
	s.state.changes.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dirs[dir] = struct{}{}
}

// Sync syncs the directories; the data were before they were renamed.
func (s *store) Sync() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	dirs := s.dirs
	s.dirs = map[string]struct{}{}
	s.mu.Unlock()
	for dir := range dirs {
		if err := syncDir(dir); err != nil {
			s.mu.Lock()
			maps.Copy(s.dirs, dirs)
			s.mu.Unlock()
			return noSpace(err)
		}
	}
	return nil
}
