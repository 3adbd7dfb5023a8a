package integration

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	root "github.com/memferry/memferry"
	"github.com/memferry/memferry/frontend/uffd"
	"github.com/memferry/memferry/internal/testenv"
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
