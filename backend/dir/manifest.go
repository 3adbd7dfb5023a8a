package dir

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/chunked"
)

const (
	manifestName    = "memferry.json"
	manifestFormat  = "memferry chunk directory"
	manifestVersion = 1
	// manifestSize is what a manifest is padded to, in bytes: a sector, which a
	// medium writes as a whole or not at all.
	manifestSize = 512
	// maxManifest bounds what is read of the file; ours has some 200 bytes.
	maxManifest = 64 << 10
	// maxGeneration bounds a tag read from a manifest.
	maxGeneration = 256
)

// manifest is the content of the manifest file.
type manifest struct {
	Format    string `json:"format"`
	Version   int    `json:"version"`
	Size      int64  `json:"size"`
	ChunkSize int64  `json:"chunk_size"`
	// Generation names the content, while Writing is false.
	Generation string `json:"generation"`
	// Writing is true from before the first change until a clean close. Found
	// so at the next open, the content is of no known generation.
	Writing bool `json:"writing"`
}

// parseManifest decodes and validates a manifest.
func parseManifest(raw []byte) (manifest, error) {
	var m manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("%w: %w", memferry.ErrCorrupt, err)
	}
	switch {
	case m.Format != manifestFormat:
		return m, fmt.Errorf("the format is %q, not %q: %w", m.Format, manifestFormat, memferry.ErrCorrupt)
	case m.Version != manifestVersion:
		return m, fmt.Errorf("version %d: this program knows %d: %w", m.Version, manifestVersion, memferry.ErrNotSupported)
	case m.Size < 0 || m.Size > memferry.MaxSize:
		return m, fmt.Errorf("size %d: %w", m.Size, memferry.ErrCorrupt)
	case len(m.Generation) > maxGeneration:
		return m, fmt.Errorf("generation of %d bytes: %w", len(m.Generation), memferry.ErrCorrupt)
	}
	if err := chunked.CheckChunkSize(m.ChunkSize); err != nil {
		return m, fmt.Errorf("%w: %w", err, memferry.ErrCorrupt)
	}
	return m, nil
}

// load reads the manifest and compares it with the options, or makes it.
func (s *store) load(o Options) error {
	path := filepath.Join(s.path, manifestName)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s.create(o)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return err
	}
	if s.manifest, err = parseManifest(raw); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	m := s.manifest
	if o.Size != 0 && o.Size != m.Size {
		return fmt.Errorf("%s: has a size of %d bytes, not %d; leave the size away to open it", s.path, m.Size, o.Size)
	}
	if o.ChunkSize != 0 && o.ChunkSize != m.ChunkSize {
		return fmt.Errorf("%s: has chunks of %d bytes, not %d; leave the chunk size away to open it", s.path, m.ChunkSize, o.ChunkSize)
	}
	return s.adopt(o.ReadOnly)
}

// adopt takes over the manifest's generation.
func (s *store) adopt(readOnly bool) error {
	if !s.manifest.Writing {
		s.state.set(s.manifest.Generation)
		return nil
	}
	if readOnly {
		return nil // unknown, and nothing may be changed
	}
	// A crash: what is there is of a generation of its own.
	s.state.set(newGeneration())
	s.manifest.Generation, s.manifest.Writing = s.state.tag(), false
	return s.writeManifest()
}

// create makes the manifest of an empty directory.
func (s *store) create(o Options) error {
	entries, err := os.ReadDir(s.path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), temporary) {
			return fmt.Errorf("%s: is not empty and has no %s: not a directory of chunks", s.path, manifestName)
		}
	}
	if o.Size == 0 || o.ReadOnly {
		return fmt.Errorf("%s: is empty; to make it a directory of chunks, give its size", s.path)
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	s.state.set(newGeneration())
	s.manifest = manifest{
		Format:     manifestFormat,
		Version:    manifestVersion,
		Size:       o.Size,
		ChunkSize:  o.ChunkSize,
		Generation: s.state.tag(),
	}
	return s.writeManifest()
}

// encode returns the manifest as it is stored, padded to manifestSize.
func (m manifest) encode() ([]byte, error) {
	raw, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return nil, err
	}
	if pad := manifestSize - 1 - len(raw); pad > 0 {
		raw = append(raw, bytes.Repeat([]byte{' '}, pad)...)
	}
	return append(raw, '\n'), nil
}

// writeManifest makes the manifest durable. On a medium without room for a
// second one it is written over.
func (s *store) writeManifest() error {
	raw, err := s.manifest.encode()
	if err != nil {
		return err
	}
	path := filepath.Join(s.path, manifestName)
	err = s.replace(path, raw)
	if errors.Is(err, memferry.ErrNoSpace) {
		return overwrite(path, raw, err)
	}
	if err != nil {
		return err
	}
	return noSpace(s.dir.Sync())
}

// overwrite writes a manifest where the last one is, if both are a sector; else
// it returns why, which is why it was tried.
func overwrite(path string, raw []byte, why error) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return errors.Join(why, err)
	}
	st, err := f.Stat()
	if err != nil || st.Size() != manifestSize || len(raw) != manifestSize {
		return errors.Join(why, err, f.Close())
	}
	_, err = f.WriteAt(raw, 0)
	if err == nil {
		err = f.Sync()
	}
	return noSpace(errors.Join(err, f.Close()))
}

// beforeWrite notes in the manifest, before the first change, that the content
// leaves its generation.
func (s *store) beforeWrite() error {
	if s.state.writing.Load() {
		s.state.changes.Add(1)
		return nil
	}
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	if !s.state.writing.Load() {
		s.manifest.Writing = true
		if err := s.writeManifest(); err != nil {
			return err
		}
		s.state.base.Store(new(newGeneration()))
		s.state.writing.Store(true)
	}
	s.state.changes.Add(1)
	return nil
}

// settle writes the last generation. What it names must be durable before.
func (s *store) settle() error {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	if !s.state.writing.Load() {
		return nil
	}
	if err := s.Sync(); err != nil {
		return err
	}
	s.manifest.Generation, s.manifest.Writing = s.state.tag(), false
	return s.writeManifest()
}

// generations makes tags: a name, and the number of changes since.
type generations struct {
	// mu is held while writing and the manifest change, the manifest's file
	// included: no change of a chunk may come before it.
	mu      sync.Mutex
	writing atomic.Bool
	base    atomic.Pointer[string]
	changes atomic.Uint64
}

func newGeneration() string { return rand.Text() }

func (g *generations) set(tag string) { g.base.Store(&tag) }

// tag returns the tag now, "" where it is unknown.
func (g *generations) tag() string {
	base := g.base.Load()
	if base == nil || *base == "" {
		return ""
	}
	if n := g.changes.Load(); n > 0 {
		return *base + "-" + strconv.FormatUint(n, 10)
	}
	return *base
}
