package file

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func open(t *testing.T, path string, o Options) *Backend {
	t.Helper()
	b, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOpenTakesSize(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "f"), "12345")
	for _, o := range []Options{{}, {Size: 5}, {ReadOnly: true}, {ReadOnly: true, Size: 5}} {
		if b := open(t, path, o); b.Size() != 5 {
			t.Errorf("%+v: size %d", o, b.Size())
		}
	}
	b := open(t, path, Options{Size: 7})
	p := make([]byte, 8)
	if n, err := b.ReadAt(p, 0); n != 7 || !errors.Is(err, io.EOF) || string(p[:7]) != "12345\x00\x00" {
		t.Errorf("after growing: %q, %v", p[:n], err)
	}
}

func TestOpenCreates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if b := open(t, path, Options{Size: 1 << 40}); b.Size() != 1<<40 {
		t.Errorf("size %d", b.Size())
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Blocks > 8 {
		t.Errorf("%d blocks, %v: not sparse", st.Blocks, err)
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	path := write(t, filepath.Join(dir, "f"), "12345")
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing")
	for _, tc := range []struct {
		path     string
		o        Options
		is       error
		mentions string
	}{
		{missing, Options{}, fs.ErrNotExist, "give its size"},
		{missing, Options{ReadOnly: true}, fs.ErrNotExist, missing},
		{missing, Options{ReadOnly: true, Size: 5}, fs.ErrNotExist, missing},
		{filepath.Join(missing, "f"), Options{Size: 5}, fs.ErrNotExist, missing},
		{path, Options{Size: 4}, nil, "never cut off"},
		{path, Options{Size: 6, ReadOnly: true}, memferry.ErrReadOnly, "less than"},
		{path, Options{Size: -1}, nil, "size -1"},
		{dir, Options{}, nil, "is a directory"},
		{fifo, Options{}, nil, "neither"},
		{"/dev/null", Options{}, nil, "neither"},
		{"", Options{}, fs.ErrNotExist, ""},
	} {
		b, err := Open(tc.path, tc.o)
		if err == nil {
			_ = b.Close()
			t.Errorf("Open(%q, %+v): no error", tc.path, tc.o)
			continue
		}
		if tc.is != nil && !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.mentions) || strings.Contains(err.Error(), "\n") {
			t.Errorf("Open(%q, %+v): %v; want %v and a mention of %q", tc.path, tc.o, err, tc.is, tc.mentions)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "12345" {
		t.Errorf("the file is now %q, %v", got, err)
	}
	if _, err := os.Stat(missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the missing file: %v", err)
	}
}

func TestNewTakesOver(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "f"), "12345")
	for _, flag := range []int{os.O_WRONLY, os.O_RDWR | os.O_APPEND} {
		f, err := os.OpenFile(path, flag, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(f, Options{}); err == nil {
			t.Errorf("flags %#x: no error", flag)
		}
		if err := f.Close(); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("flags %#x: New failed but left the file open", flag)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(f, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	c := b.Capabilities()
	if !c.ReadOnly || c.Trimmer != nil || c.ZeroWriter != nil || c.Filer == nil || c.Filer.File() != f {
		t.Errorf("capabilities %+v", c)
	}
	for _, err := range []error{second(b.WriteAt([]byte{1}, 0)), b.Trim(0, 1), b.WriteZeroes(0, 1, 0)} {
		if !errors.Is(err, memferry.ErrReadOnly) {
			t.Errorf("%v, want ErrReadOnly", err)
		}
	}
	if err := b.Sync(); err != nil {
		t.Error(err)
	}
}

func second(_ int, err error) error { return err }

func TestExtentsAndTrim(t *testing.T) {
	const block = 1 << 20
	b := open(t, filepath.Join(t.TempDir(), "f"), Options{Size: 5 * block})
	data := bytes.Repeat([]byte{1}, 3*block)
	if _, err := b.WriteAt(data, block); err != nil {
		t.Fatal(err)
	}
	if b.Capabilities().Trimmer == nil || b.Capabilities().Extenter == nil {
		t.Skip("this filesystem has no holes; set TMPDIR to one that has")
	}
	if err := b.Trim(2*block, block); err != nil {
		t.Fatal(err)
	}
	const hole = memferry.ExtentHole | memferry.ExtentZero
	want := []memferry.Extent{
		{Off: 1, Len: block - 1, Flags: hole},
		{Off: block, Len: block},
		{Off: 2 * block, Len: block, Flags: hole},
		{Off: 3 * block, Len: block},
		{Off: 4 * block, Len: block - 1, Flags: hole},
	}
	got, err := b.Extents(t.Context(), 1, 5*block-2)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

// Every write changes the tag, however soon after the tag was taken; an unused
// file keeps it.
func TestGeneration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	b := open(t, path, Options{Size: 1 << 20})
	tag := func() string {
		t.Helper()
		g, err := b.Generation(t.Context())
		if err != nil || g == "" {
			t.Fatalf("generation %q, %v", g, err)
		}
		return g
	}
	seen := map[string]bool{}
	for i := range 20 {
		if _, err := b.WriteAt([]byte{byte(i)}, int64(i)); err != nil {
			t.Fatal(err)
		}
		g := tag()
		if seen[g] {
			t.Fatalf("write %d left the tag %s", i, g)
		}
		seen[g] = true
	}
	last := tag()
	_ = b.Close()
	b = open(t, path, Options{ReadOnly: true})
	if g := tag(); g != last {
		t.Errorf("opening again changed the tag from %s to %s", last, g)
	}
}

func TestCutOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	b := open(t, path, Options{Size: 1 << 20})
	if err := os.Truncate(path, 100); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 200)
	if n, err := b.ReadAt(p, 0); n != 100 || !errors.Is(err, memferry.ErrChanged) {
		t.Errorf("%d, %v; want 100, ErrChanged", n, err)
	}
	if _, err := b.ReadAt(p, 1<<19); !errors.Is(err, memferry.ErrChanged) {
		t.Errorf("%v; want ErrChanged", err)
	}
}

func TestNoSpace(t *testing.T) {
	dir := testenv.Tmpfs(t, 64<<10)
	b := open(t, filepath.Join(dir, "f"), Options{Size: 1 << 20})
	if _, err := b.WriteAt(make([]byte, 1<<20), 0); !errors.Is(err, memferry.ErrNoSpace) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v; want ErrNoSpace", err)
	}
	if _, err := b.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Errorf("reading on a full medium: %v", err)
	}
}

// loopDevice returns a block device of n bytes, all of them x.
func loopDevice(t *testing.T, n int) string {
	t.Helper()
	testenv.Root(t)
	losetup := testenv.Program(t, "losetup")
	image := write(t, filepath.Join(t.TempDir(), "image"), strings.Repeat("x", n))
	out, err := exec.Command(losetup, "--find", "--show", image).Output()
	if err != nil {
		t.Skipf("losetup: %v: needs /dev/loop-control and a free loop device", err)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command(losetup, "--detach", device).Run(); err != nil {
			t.Errorf("detach %s: %v", device, err)
		}
	})
	return device
}

func TestBlockDevice(t *testing.T) {
	const size = 1 << 20
	device := loopDevice(t, size)
	if b, err := Open(device, Options{Size: 2 * size}); err == nil || !strings.Contains(err.Error(), "is a block device") {
		_ = b.Close()
		t.Errorf("another size: %v", err)
	}
	b, err := Open(device, Options{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	c := b.Capabilities()
	if b.Size() != size || c.Generationer != nil || c.Extenter != nil || c.ZeroWriter == nil {
		t.Fatalf("size %d, capabilities %+v", b.Size(), c)
	}
	model := bytes.Repeat([]byte{'x'}, size)
	zero := func(off, n int64) { clear(model[off : off+n]) }
	check := func(what string) {
		t.Helper()
		p := make([]byte, size)
		if _, err := b.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, model) {
			t.Errorf("%s: wrong bytes", what)
			copy(model, p)
		}
	}
	for i, flags := range []memferry.ZeroFlags{0, memferry.ZeroNoHole, memferry.ZeroFast} {
		off := int64(i)*100_000 + 5
		err := b.WriteZeroes(off, 50_000, flags)
		if flags == memferry.ZeroFast && errors.Is(err, memferry.ErrNotSupported) {
			check("refused zeroes")
			continue
		}
		if err != nil {
			t.Fatalf("zeroes, flags %d: %v", flags, err)
		}
		zero(off, 50_000)
		check("zeroes")
	}
	if err := b.WriteZeroes(700_001, 3, 0); err != nil {
		t.Fatal(err)
	}
	zero(700_001, 3)
	check("a few zeroes")
	if c.Trimmer != nil {
		if err := b.Trim(800_001, 10_000); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, size)
		_, _ = b.ReadAt(p, 0)
		if !bytes.Equal(p[:800_001], model[:800_001]) || !bytes.Equal(p[810_001:], model[810_001:]) {
			t.Error("trim changed bytes outside of its range")
		}
	}
	if err := b.Sync(); err != nil {
		t.Error(err)
	}
}

func TestMemfd(t *testing.T) {
	b, err := NewMemfd("test", 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	c := b.Capabilities()
	if c.Viewer == nil || c.Filer == nil || c.Trimmer == nil || c.Extenter == nil || c.Generationer != nil {
		t.Errorf("capabilities %+v", c)
	}
	v, err := c.Viewer.ViewForWrite(1<<39, 4)
	if err != nil {
		t.Fatal(err)
	}
	copy(v, "view")
	p := make([]byte, 4)
	if _, err := b.ReadAt(p, 1<<39); err != nil || string(p) != "view" {
		t.Errorf("read %q, %v", p, err)
	}
	if _, err := b.WriteAt([]byte("wr"), 1<<39); err != nil || string(v) != "wrew" {
		t.Errorf("view %q, %v", v, err)
	}
	c.Viewer.ReleaseView()
	if err := b.File().Truncate(5); err == nil {
		t.Error("the size is not sealed")
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Viewer.View(0, 1); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("view after close: %v", err)
	}
	empty, err := NewMemfd("empty", 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := empty.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenKeepsTheGeneration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	var tags []string
	for i := range 2 {
		b, err := Open(path, Options{Size: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		tag, err := b.Generation(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		tags = append(tags, tag)
		b.Close()
		if i == 0 {
			time.Sleep(20 * time.Millisecond) // longer than the kernel's clock for times of files
		}
	}
	if tags[0] != tags[1] {
		t.Errorf("generation %s, and %s when opened again", tags[0], tags[1])
	}
}
