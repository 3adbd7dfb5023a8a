package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	root "github.com/memferry/memferry"
	"github.com/memferry/memferry/frontend/fuse"
	"github.com/memferry/memferry/frontend/uffd"
	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/region"
)

// TestMemoryHelper: a program without a helper of its own, as this one, has its
// memory served by the command, from any backend that the command knows.
func TestMemoryHelper(t *testing.T) {
	t.Setenv("PATH", filepath.Dir(memferry)+string(os.PathListSeparator)+os.Getenv("PATH"))
	want := pattern(50, 4*mib)
	s := serve(t, "disk="+file(t, "disk", want))
	m, err := uffd.OpenURL(testenv.Deadline(t, hang), s.uri("disk"), uffd.Options{})
	if errors.Is(err, root.ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m.Bytes(), want) {
		t.Error("the memory differs from the export")
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestMemoryAsFile: a memory is a backend, so the same bytes are a file at the
// same time. Reads and writes of one are seen in the other, before all of it is
// here and after, and what was written to either reaches the source.
func TestMemoryAsFile(t *testing.T) {
	testenv.FUSE(t)
	t.Setenv("PATH", filepath.Dir(memferry)+string(os.PathListSeparator)+os.Getenv("PATH"))
	want := pattern(51, 16*mib)
	source := file(t, "disk", want)
	m, err := uffd.OpenURL(testenv.Deadline(t, hang), source, uffd.Options{Pull: region.PullNone})
	if errors.Is(err, root.ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	d, err := fuse.Mount(t.Context(), m, filepath.Join(t.TempDir(), "disk"), fuse.Options{Uncached: true})
	if err != nil {
		t.Fatal(err)
	}
	fill := func(b byte, n int) string {
		return file(t, "piece", bytes.Repeat([]byte{b}, n))
	}
	for i, off := range []int64{5000, 8 * mib, 16*mib - 3000} {
		p := []byte{byte(200 + i), 1, 2, 3}
		copy(m.Bytes()[off:], p) // seen in the file
		copy(want[off:], p)
		const n = 1000 // bytes of the file, seen in the memory
		at := off + mib/2
		if i == 2 {
			at = off - mib/2
		}
		run(t, "dd", "if="+fill(byte(100+i), n), "of="+d.Path(), "conv=notrunc", "bs=1000", "oflag=seek_bytes", fmt.Sprintf("seek=%d", at))
		copy(want[at:], bytes.Repeat([]byte{byte(100 + i)}, n))
		if !bytes.Equal(m.Bytes()[at:at+n], want[at:at+n]) {
			t.Errorf("a write of the file at %d is not in the memory", at)
		}
		run(t, "cmp", d.Path(), file(t, "want", want))
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(m.Bytes(), want) {
		t.Error("the memory differs")
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(source); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the source differs (%v)", err)
	}
}
