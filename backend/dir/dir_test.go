package dir

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/backend/chunked"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// tempDir is in memory where that is possible: each put is an fsync.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "memferry-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func open(t testing.TB, path string, o Options) *chunked.Backend {
	t.Helper()
	b, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func TestContract(t *testing.T) {
	const size = 1<<20 + 123
	backendtest.Run(t, func(t testing.TB) memferry.Backend {
		return open(t, filepath.Join(tempDir(t), "d"), Options{Size: size, ChunkSize: 64 << 10})
	}, backendtest.Options{Steps: 10})
	t.Run("read-only", func(t *testing.T) {
		backendtest.Run(t, func(t testing.TB) memferry.Backend {
			path := tempDir(t)
			w := open(t, path, Options{Size: size})
			if _, err := w.WriteAt(bytes.Repeat([]byte{1}, 100), 1000); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			return open(t, path, Options{ReadOnly: true})
		}, backendtest.Options{Filled: true, Steps: 10})
	})
}

func put(t testing.TB, b memferry.Backend, off int64, s string) {
	t.Helper()
	if _, err := b.WriteAt([]byte(s), off); err != nil {
		t.Fatal(err)
	}
}

func get(t testing.TB, b memferry.Backend, off int64, n int) string {
	t.Helper()
	p := make([]byte, n)
	if _, err := b.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	return string(p)
}

func generation(t testing.TB, b *chunked.Backend) string {
	t.Helper()
	g, err := b.Generation(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// What was written is there after a reopen, under the same tag, with the sizes
// from the manifest; the tail chunk is no longer than what it holds.
func TestReopen(t *testing.T) {
	const chunk, size = 4096, 5000*4096 + 10
	path := tempDir(t)
	b := open(t, path, Options{Size: size, ChunkSize: chunk})
	first := generation(t, b)
	put(t, b, 10, "start")
	put(t, b, size-3, "end")
	last := generation(t, b)
	if first == "" || first == last {
		t.Errorf("generations %q and %q", first, last)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b = open(t, path, Options{})
	if b.Size() != size || b.ChunkSize() != chunk {
		t.Errorf("size %d, chunk %d", b.Size(), b.ChunkSize())
	}
	if got := get(t, b, 10, 5) + get(t, b, size-3, 3); got != "startend" {
		t.Errorf("read %q", got)
	}
	if g := generation(t, b); g != last {
		t.Errorf("generation %q, was %q", g, last)
	}
	const hole = memferry.ExtentHole | memferry.ExtentZero
	want := []memferry.Extent{{Len: chunk}, {Off: chunk, Len: 4999 * chunk, Flags: hole}, {Off: 5000 * chunk, Len: 10}}
	got, err := b.Extents(t.Context(), 0, size)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	put(t, b, 10, "START")
	if g := generation(t, b); g == last {
		t.Errorf("generation %q after another write", g)
	}
}

func TestOpenErrors(t *testing.T) {
	root := tempDir(t)
	at := func(name string) string { return filepath.Join(root, name) }
	ours := at("ours")
	if err := open(t, ours, Options{Size: 1 << 20, ChunkSize: 4096}).Close(); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"foreign/photo.jpg":       "x",
		"broken/" + manifestName:  `{"format":`,
		"other/" + manifestName:   `{"format":"other"}`,
		"future/" + manifestName:  `{"format":"memferry chunk directory","version":2}`,
		"chunks0/" + manifestName: `{"format":"memferry chunk directory","version":1,"size":5}`,
		"minus/" + manifestName:   `{"format":"memferry chunk directory","version":1,"size":-5,"chunk_size":4096}`,
		"file":                    "",
		"empty/.tmp-1":            "left by a crash",
	} {
		if err := os.MkdirAll(filepath.Dir(at(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name     string
		o        Options
		is       error
		mentions string
	}{
		{"missing", Options{}, fs.ErrNotExist, "give its size"},
		{"missing", Options{Size: 5, ReadOnly: true}, fs.ErrNotExist, ""},
		{"missing/below", Options{Size: 5}, fs.ErrNotExist, ""},
		{"empty", Options{}, nil, "give its size"},
		{"empty", Options{Size: 1 << 20, ChunkSize: 5000}, nil, "power of two"},
		{"empty", Options{Size: -1}, nil, "size -1"},
		{"foreign", Options{Size: 5}, nil, "not a directory of chunks"},
		{"broken", Options{}, memferry.ErrCorrupt, manifestName},
		{"other", Options{}, memferry.ErrCorrupt, `"other"`},
		{"future", Options{}, memferry.ErrNotSupported, "version 2"},
		{"chunks0", Options{}, memferry.ErrCorrupt, "chunk size 0"},
		{"minus", Options{}, memferry.ErrCorrupt, "size -5"},
		{"file", Options{Size: 5}, nil, "not a directory"},
		{"ours", Options{Size: 2 << 20}, nil, "1048576 bytes, not 2097152"},
		{"ours", Options{ChunkSize: 8192}, nil, "chunks of 4096 bytes, not 8192"},
	} {
		b, err := Open(at(tc.name), tc.o)
		if err == nil {
			_ = b.Close()
			t.Errorf("Open(%s, %+v): no error", tc.name, tc.o)
			continue
		}
		if tc.is != nil && !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.mentions) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Open(%s, %+v): %v; want %v and a mention of %q", tc.name, tc.o, err, tc.is, tc.mentions)
		}
	}
	if _, err := os.Stat(at("missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a refused open left something: %v", err)
	}
	if b := open(t, at("empty"), Options{Size: 5}); b.Size() != 5 {
		t.Errorf("size %d", b.Size())
	}
	if _, err := os.Stat(at("empty/.tmp-1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the leftover is still there: %v", err)
	}
}

func TestOneWriter(t *testing.T) {
	path := tempDir(t)
	w := open(t, path, Options{Size: 1 << 20})
	for _, o := range []Options{{}, {ReadOnly: true}} {
		if _, err := Open(path, o); !errors.Is(err, memferry.ErrInUse) {
			t.Errorf("%+v beside a writer: %v", o, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path, Options{ReadOnly: true})
	open(t, path, Options{ReadOnly: true})
	if _, err := Open(path, Options{}); !errors.Is(err, memferry.ErrInUse) {
		t.Errorf("beside readers: %v", err)
	}
}

// A copy of the directory is what kill -9 leaves.
func TestCrash(t *testing.T) {
	path, copied := tempDir(t), filepath.Join(tempDir(t), "copy")
	b := open(t, path, Options{Size: 1 << 20, ChunkSize: 4096})
	before := generation(t, b)
	put(t, b, 5000, "data")
	if err := os.WriteFile(filepath.Join(path, temporary+"x"), []byte("half a chu"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(copied, os.DirFS(path)); err != nil {
		t.Fatal(err)
	}
	r := open(t, copied, Options{ReadOnly: true})
	if g := generation(t, r); g != "" {
		t.Errorf("generation %q of a read-only open after a crash", g)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	c := open(t, copied, Options{})
	if got := get(t, c, 5000, 4); got != "data" {
		t.Errorf("read %q", got)
	}
	if _, err := os.Stat(filepath.Join(copied, temporary+"x")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file: %v", err)
	}
	after := generation(t, c)
	if after == "" || after == before || after == generation(t, b) {
		t.Errorf("generation %q after a crash; %q before the write", after, before)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if g := generation(t, open(t, copied, Options{})); g != after {
		t.Errorf("generation %q, then %q", after, g)
	}
}

// A chunk of the wrong length is refused, and the others can be read.
func TestDamagedChunk(t *testing.T) {
	path := tempDir(t)
	b := open(t, path, Options{Size: 1 << 20, ChunkSize: 4096})
	put(t, b, 0, "data")
	put(t, b, 4096, "more")
	_, file := (&store{path: path}).place(0)
	if err := os.Truncate(file, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := b.ReadAt(make([]byte, 4), 0); !errors.Is(err, memferry.ErrCorrupt) || !strings.Contains(err.Error(), file) {
		t.Errorf("%v; want ErrCorrupt of %s", err, file)
	}
	if got := get(t, b, 4096, 4); got != "more" {
		t.Errorf("read %q", got)
	}
}

func TestFullMedium(t *testing.T) {
	path := testenv.Tmpfs(t, 256<<10)
	b := open(t, path, Options{Size: 1 << 20, ChunkSize: 64 << 10})
	put(t, b, 0, "kept")
	_, err := b.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0)
	if !errors.Is(err, memferry.ErrNoSpace) {
		t.Errorf("%v; want ErrNoSpace", err)
	}
	if err := b.Trim(64<<10, 1<<20-64<<10); err != nil {
		t.Errorf("trim on a full medium: %v", err)
	}
	put(t, b, 64<<10, "again")
	_ = b.Close()
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"format":"memferry chunk directory","version":1,"size":5,"chunk_size":4096,"generation":"x","writing":true}`))
	f.Add([]byte(`{"size":-1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := parseManifest(raw)
		if err == nil && (m.Size < 0 || chunked.CheckChunkSize(m.ChunkSize) != nil || m.Version != manifestVersion) {
			t.Fatalf("%q: %+v", raw, m)
		}
	})
}
