package dir

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// fillUp takes all that is left of a file system.
func fillUp(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

// TestFullMediumKeepsAll: on a medium without a free byte what was acknowledged stays,
// the generation is kept, and what gives space back can be done.
func TestFullMediumKeepsAll(t *testing.T) {
	medium := testenv.Tmpfs(t, 512<<10)
	path := filepath.Join(medium, "chunks")
	const chunk = 64 << 10
	b, err := Open(path, Options{Size: 16 * chunk, ChunkSize: chunk})
	if err != nil {
		t.Fatal(err)
	}
	acknowledged := int64(0)
	for err == nil {
		if _, err = b.WriteAt(bytes.Repeat([]byte{byte(acknowledged + 1)}, chunk), acknowledged*chunk); err == nil {
			acknowledged++
		}
	}
	if !errors.Is(err, memferry.ErrNoSpace) || acknowledged == 0 || strings.Contains(err.Error(), "\n") {
		t.Fatalf("after %d chunks: %v, want one line of no space left", acknowledged, err)
	}
	fillUp(t, medium)
	if err := b.Sync(); err != nil {
		t.Errorf("sync: %v", err)
	}
	tag, _ := b.Generation(context.Background())
	if err := b.Close(); err != nil {
		t.Errorf("close: %v", err)
	}

	b, err = Open(path, Options{})
	if err != nil {
		t.Fatalf("open again: %v", err)
	}
	if again, _ := b.Generation(context.Background()); again != tag || tag == "" {
		t.Errorf("generation %q, was %q", again, tag)
	}
	p := make([]byte, chunk)
	for i := range acknowledged {
		if _, err := b.ReadAt(p, i*chunk); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{byte(i + 1)}, chunk)) {
			t.Errorf("chunk %d: %v, or other bytes", i, err)
		}
	}
	if err := b.Trim(0, chunk); err != nil {
		t.Fatalf("the first change, which gives space back: %v", err)
	}
	if again, _ := b.Generation(context.Background()); again == tag {
		t.Error("the generation stays after a change")
	}
	if _, err := b.WriteAt(p[:10], 5*chunk); err != nil {
		t.Errorf("a write into what was given back: %v", err)
	}
	crashed := writingManifest(t, path)
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	// As after a kill: the manifest says that somebody was writing.
	fillUp(t, medium)
	if err := os.WriteFile(filepath.Join(path, manifestName), crashed, 0o600); err != nil {
		t.Fatal(err)
	}
	b, err = Open(path, Options{})
	if err != nil {
		t.Fatalf("open after a crash: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// writingManifest reads the manifest and checks its form.
func writingManifest(t *testing.T, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(path, manifestName))
	if err != nil || len(raw) != manifestSize {
		t.Fatalf("a manifest of %d bytes, %v", len(raw), err)
	}
	if m, err := parseManifest(raw); err != nil || !m.Writing {
		t.Fatalf("manifest %+v, %v: somebody is writing", m, err)
	}
	return raw
}
