package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/region"
)

var _ region.Store = (*Cache)(nil)

func testIdentity() Identity {
	return Identity{URL: "nbd://host/export", Size: 1<<20 + 5}
}

func mustOpen(t testing.TB, dir string, id Identity, o Options) *Cache {
	t.Helper()
	c, err := Open(dir, id, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.release() })
	return c
}

func mustClose(t testing.TB, c *Cache) {
	t.Helper()
	for range 2 {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func runs(t testing.TB, c *Cache) string {
	t.Helper()
	var b strings.Builder
	err := c.Load(func(page, n int64, dirty bool) error {
		fmt.Fprintf(&b, "%d+%d %t\n", page, n, dirty)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "cache")
	c := mustOpen(t, dir, testIdentity(), Options{})
	if got := runs(t, c); got != "" {
		t.Errorf("a new cache has %q", got)
	}
	if _, err := c.Local().WriteAt([]byte("hello"), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := c.Local().Sync(); err != nil {
		t.Fatal(err)
	}
	if err := c.Commit([]chunk.Change{{Page: 256, N: 1, State: chunk.Dirty}, {Page: 3, N: 2, State: chunk.Present}}); err != nil {
		t.Fatal(err)
	}
	if err := c.Intend(4, 1); err != nil {
		t.Fatal(err)
	}
	mustClose(t, c)
	c = mustOpen(t, dir, testIdentity(), Options{BootID: "another boot"})
	if got, want := runs(t, c), "3+1 false\n4+1 true\n256+1 true\n"; got != want {
		t.Errorf("reopened: %q, want %q", got, want)
	}
	p := make([]byte, 5)
	if _, err := c.Local().ReadAt(p, 1<<20); err != nil || string(p) != "hello" {
		t.Errorf("read %q, %v", p, err)
	}
	if f := memferry.CapabilitiesOf(c.Local()).Filer; f == nil || f.File() == nil {
		t.Error("the local backend is no file")
	}
	mustClose(t, c)
	if err := c.Intend(3, 1); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("intent after Close: %v", err)
	}
}

// refused opens with id and wants an error of one kind that says each of parts.
func refused(t *testing.T, dir string, id Identity, kind error, parts ...string) {
	t.Helper()
	c, err := Open(dir, id, Options{})
	if err == nil {
		c.release()
		t.Fatal("opened")
	}
	if kind != nil && !errors.Is(err, kind) {
		t.Errorf("%v is not %v", err, kind)
	}
	for _, part := range append(parts, dir) {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("%q is more than a line", err)
	}
}

func TestAnotherRemote(t *testing.T) {
	dir := t.TempDir()
	id := testIdentity()
	id.URL = "nbd://user:secret@host/export"
	c := mustOpen(t, dir, id, Options{})
	if err := c.Commit([]chunk.Change{{Page: 0, N: 2, State: chunk.Dirty}}); err != nil {
		t.Fatal(err)
	}
	mustClose(t, c)
	p, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil || bytes.Contains(p, []byte("secret")) {
		t.Errorf("the state has the password, or %v", err)
	}

	other := testIdentity()
	other.URL = "nbd://other/export"
	refused(t, dir, other, memferry.ErrChanged, "nbd://host/export", "nbd://other/export", "another directory", "8 KiB")
	other = testIdentity()
	other.Size = 2 << 20
	refused(t, dir, other, memferry.ErrChanged, "2 MiB")

	c = mustOpen(t, dir, testIdentity(), Options{}) // nothing was harmed
	if got := runs(t, c); got != "0+2 true\n" {
		t.Errorf("kept %q", got)
	}
}

func TestRemembersTheRemote(t *testing.T) {
	dir := t.TempDir()
	c := mustOpen(t, dir, testIdentity(), Options{})
	for _, pushing := range []bool{true, false} {
		tag, session := fmt.Sprintf("tag %t", pushing), fmt.Sprintf("session %t", pushing)
		if err := errors.Join(c.SetGeneration(tag, pushing), c.SetRemoteSession(session)); err != nil {
			t.Fatal(err)
		}
		mustClose(t, c)
		c = mustOpen(t, dir, testIdentity(), Options{})
		if gotTag, got := c.Generation(); gotTag != tag || got != pushing {
			t.Errorf("generation %q, %t; want %q, %t", gotTag, got, tag, pushing)
		}
		if got := c.RemoteSession(); got != session {
			t.Errorf("session %q, want %q", got, session)
		}
	}
	if err := c.SetRemoteSession(strings.Repeat("x", memferry.MaxSession+1)); err == nil {
		t.Error("a name of any length is stored")
	}
}

func TestForeignDirectory(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "precious")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, dir, testIdentity(), nil, "precious", "not a cache")
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("files were left in it: %v, %v", entries, err)
	}
	refused(t, path, testIdentity(), nil)
	refused(t, "/proc/none", testIdentity(), nil)
}

func TestInUse(t *testing.T) {
	dir := t.TempDir()
	c := mustOpen(t, dir, testIdentity(), Options{})
	refused(t, dir, testIdentity(), memferry.ErrInUse, fmt.Sprint(os.Getpid()))
	mustClose(t, c)

	// Another process, which is then killed.
	dir = t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), envVictim+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 5)); err != nil {
		t.Error(err)
	}
	refused(t, dir, victimIdentity(), memferry.ErrInUse, fmt.Sprint(cmd.Process.Pid))
	cmd.Process.Kill()
	cmd.Wait()
	mustClose(t, mustOpen(t, dir, victimIdentity(), Options{}))
}

// Whatever happens to the files, they are not taken for something else.
func TestDamage(t *testing.T) {
	for name, damage := range map[string]func(dir string) error{
		"state cut":        func(d string) error { return os.Truncate(filepath.Join(d, stateName), 40) },
		"state empty":      func(d string) error { return os.Truncate(filepath.Join(d, stateName), 0) },
		"state removed":    func(d string) error { return os.Remove(filepath.Join(d, stateName)) },
		"data removed":     func(d string) error { return os.Remove(filepath.Join(d, dataName)) },
		"data cut":         func(d string) error { return os.Truncate(filepath.Join(d, dataName), 5) },
		"journals removed": func(d string) error { return removeAll(d, journalPrefix+"*") },
		"journals empty": func(d string) error {
			names, _ := filepath.Glob(filepath.Join(d, journalPrefix+"*"))
			return os.Truncate(names[0], 0)
		},
		"data and state removed": func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, stateName)), os.Remove(filepath.Join(d, dataName)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c := mustOpen(t, dir, testIdentity(), Options{})
			if _, err := c.Local().WriteAt([]byte("hello"), 0); err != nil {
				t.Fatal(err)
			}
			if err := c.Commit([]chunk.Change{{Page: 0, N: 1, State: chunk.Dirty}}); err != nil {
				t.Fatal(err)
			}
			if err := c.release(); err != nil { // as killed
				t.Fatal(err)
			}
			if err := damage(dir); err != nil {
				t.Fatal(err)
			}
			refused(t, dir, testIdentity(), memferry.ErrCorrupt, "delete it")
		})
	}
}

func removeAll(dir, pattern string) error {
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	for _, name := range names {
		err = errors.Join(err, os.Remove(name))
	}
	return err
}

// What the first opening leaves when it is cut off is not a cache yet.
func TestUnfinishedCreation(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{dataName, stateTemp, journalTemp, lockName} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	id := journalID{5, 1}
	if err := os.WriteFile(filepath.Join(dir, journalName(1)), id.encodeHeader(), 0o600); err != nil {
		t.Fatal(err)
	}
	mustClose(t, mustOpen(t, dir, testIdentity(), Options{}))
	mustClose(t, mustOpen(t, dir, testIdentity(), Options{}))
}

func TestBadIdentity(t *testing.T) {
	for _, n := range []int64{-1, 0, MaxSize + 1} {
		id := testIdentity()
		id.Size = n
		refused(t, t.TempDir(), id, nil, "size")
	}
	if _, err := Open(t.TempDir(), testIdentity(), Options{JournalLimit: -1}); err == nil {
		t.Error("a negative journal limit is accepted")
	}
}

func TestTebibyte(t *testing.T) {
	dir := t.TempDir()
	id := Identity{URL: "mem:", Size: 1 << 40}
	c := mustOpen(t, dir, id, Options{})
	pages := id.Size / memferry.PageSize
	if err := c.Commit([]chunk.Change{{Page: 0, N: pages, State: chunk.Present}}); err != nil {
		t.Fatal(err)
	}
	for p := int64(0); p < pages; p += pages / 1000 {
		if err := c.Intend(p, 1); err != nil {
			t.Fatal(err)
		}
	}
	var before, after runtime.MemStats
	mustClose(t, c)
	runtime.GC()
	runtime.ReadMemStats(&before)
	c = mustOpen(t, dir, id, Options{})
	runtime.GC()
	runtime.ReadMemStats(&after)
	if used := int64(after.HeapAlloc) - int64(before.HeapAlloc); used > 32<<20 {
		t.Errorf("%d bytes of memory", used)
	}
	if n := c.store.pages.count(); n[clean]+n[intended] != pages || n[intended] < 1000 {
		t.Errorf("pages by status: %v", n)
	}
	mustClose(t, c)
}

func TestFullFileSystem(t *testing.T) {
	dir := filepath.Join(testenv.Tmpfs(t, 512<<10), "cache")
	id := Identity{URL: "mem:", Size: 64 << 20}
	c := mustOpen(t, dir, id, Options{JournalLimit: 16 << 10})
	pages := id.Size / memferry.PageSize
	if err := c.Commit([]chunk.Change{{Page: 0, N: pages, State: chunk.Present}}); err != nil {
		t.Fatal(err)
	}
	fill := filepath.Join(filepath.Dir(dir), "fill")
	if err := os.WriteFile(fill, make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("the file system does not fill up")
	}
	if _, err := c.Local().WriteAt(make([]byte, 1<<20), 0); !errors.Is(err, memferry.ErrNoSpace) {
		t.Errorf("write to data: %v", err)
	}
	var err error
	recorded := int64(0)
	for ; err == nil && recorded < pages; recorded++ {
		if err = c.Intend(recorded, 1); err != nil {
			break
		}
	}
	if !errors.Is(err, memferry.ErrNoSpace) {
		t.Fatalf("after %d intents: %v", recorded, err)
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	for p := recorded; p < recorded+500; p++ {
		if err := c.Intend(p, 1); err != nil {
			t.Fatalf("with space again: %v", err)
		}
	}
	if err := c.Commit([]chunk.Change{{Page: 0, N: 1, State: chunk.Dirty}}); err != nil {
		t.Fatalf("with space again: %v", err)
	}
	want := runs(t, c)
	if err := c.release(); err != nil { // as killed
		t.Fatal(err)
	}
	c = mustOpen(t, dir, id, Options{})
	if got := runs(t, c); got != want {
		t.Errorf("reopened: %q, want %q", got, want)
	}
}

func TestConcurrentUse(t *testing.T) {
	id := Identity{URL: "mem:", Size: 16 << 20}
	dir := t.TempDir()
	c := mustOpen(t, dir, id, Options{JournalLimit: 4 << 10})
	pages := id.Size / memferry.PageSize
	if err := c.Commit([]chunk.Change{{Page: 0, N: pages, State: chunk.Present}}); err != nil {
		t.Fatal(err)
	}
	// Each writer has its own half of every run of 8 pages, and what it has
	// intended stays intended, whatever is committed of the others' pages.
	var wg sync.WaitGroup
	for i := range int64(2) {
		wg.Go(func() {
			for p := i * 4; p < pages; p += 8 {
				if err := c.Intend(p, 3); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for p := int64(3); p < pages; p += 32 {
			if err := c.Commit([]chunk.Change{{Page: p, N: 1, State: chunk.PageState(p / 32 % 3)}}); err != nil {
				t.Error(err)
			}
			if err := c.SetGeneration(fmt.Sprint(p), true); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	want := runs(t, c)
	if err := c.release(); err != nil {
		t.Fatal(err)
	}
	c = mustOpen(t, dir, id, Options{})
	if got := runs(t, c); got != want {
		t.Error("the files don't say what memory does")
	}
	n := c.store.pages.count()
	if n[intended] < pages/8*6 {
		t.Errorf("pages by status: %v", n)
	}
}

func TestLocalCapabilities(t *testing.T) {
	c := mustOpen(t, t.TempDir(), Identity{URL: "mem:", Size: 1 << 30}, Options{})
	caps := memferry.CapabilitiesOf(c.Local())
	if caps.Extenter == nil {
		t.Skip("needs a file system with SEEK_HOLE")
	}
	ext, err := caps.Extenter.Extents(context.Background(), 0, 1<<30)
	if err != nil || len(ext) != 1 || ext[0].Flags&memferry.ExtentHole == 0 {
		t.Errorf("a new cache is not sparse: %v, %v", ext, err)
	}
}

func BenchmarkIntend(b *testing.B) {
	id := Identity{URL: "mem:", Size: 64 << 30}
	c := mustOpen(b, b.TempDir(), id, Options{})
	pages := id.Size / memferry.PageSize
	all := []chunk.Change{{Page: 0, N: pages, State: chunk.Present}}
	b.Run("repeated", func(b *testing.B) {
		for b.Loop() {
			c.Intend(7, 1)
		}
	})
	b.Run("new", func(b *testing.B) {
		if err := c.Commit(all); err != nil {
			b.Fatal(err)
		}
		p := int64(0)
		for b.Loop() {
			if err := c.Intend(p, 1); err != nil {
				b.Fatal(err)
			}
			p = (p + 977) % pages
		}
	})
}
