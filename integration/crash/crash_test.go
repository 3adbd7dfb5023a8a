// Package crash kills processes that use a region with a persistent cache, at
// random instants and over and over, and checks byte by byte what they leave.
package crash

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/file"
	"github.com/memferry/memferry/internal/cache"
	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/region"
)

const (
	// cell is the unit of writes: a version number, repeated.
	cell      = 512
	cells     = regionSize / cell
	pageCells = memferry.PageSize / cell
	// regionSize does not end with a page, nor a chunk.
	regionSize = 4<<20 + 3*cell
	writers    = 4

	// rounds is how often a process is killed.
	rounds      = 105
	shortRounds = 15
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(envDir); dir != "" {
		child(dir)
	}
	testenv.Main(m)
}

// history is what is known of one cell: the value that must be there at least
// (or something newer), and what was begun to be written since, in order.
type history struct {
	values   []uint64 // values[0] has been synced, or was seen after a crash
	done     int      // index of the last write that has returned
	snapshot int      // done, when the sync in progress began
}

// world is the parent's knowledge.
type world struct {
	dir   string
	cells []history
	open  [writers]write // the write that each writer is in
}

type write struct {
	first, n int
	value    uint64
}

func newWorld(t *testing.T) *world {
	w := &world{dir: t.TempDir(), cells: make([]history, cells)}
	content := make([]byte, 0, regionSize)
	for i := range w.cells {
		w.cells[i].values = []uint64{uint64(i) + 1}
		content = append(content, cellOf(uint64(i)+1)...)
	}
	if err := os.WriteFile(remotePath(w.dir), content, 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

func cellOf(v uint64) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, v), cell/8)
}

// hear takes in one line that a child said.
func (w *world) hear(line string) error {
	var i int
	var wr write
	switch verb, _, _ := strings.Cut(line, " "); verb {
	case "w": // writer i begins to write
		if _, err := fmt.Sscanf(line, "w %d %d %d %d", &i, &wr.first, &wr.n, &wr.value); err != nil {
			return err
		}
		w.open[i] = wr
		for c := wr.first; c < wr.first+wr.n; c++ {
			w.cells[c].values = append(w.cells[c].values, wr.value)
		}
	case "d": // and has done so
		if _, err := fmt.Sscanf(line, "d %d", &i); err != nil {
			return err
		}
		wr = w.open[i]
		for c := wr.first; c < wr.first+wr.n; c++ {
			w.cells[c].done = len(w.cells[c].values) - 1
		}
	case "s":
		for c := range w.cells {
			w.cells[c].snapshot = w.cells[c].done
		}
	case "S":
		for c := range w.cells {
			h := &w.cells[c]
			h.values = h.values[h.snapshot:]
			h.done -= h.snapshot
			h.snapshot = 0
		}
	case "ready", "closed":
	default:
		return fmt.Errorf("the child said %q", line)
	}
	return nil
}

// see checks that a cell holds something that it may hold after a crash, which
// becomes what it must hold from now on.
func (h *history) see(v uint64) error {
	for i := len(h.values) - 1; i >= 0; i-- {
		if h.values[i] == v {
			*h = history{values: []uint64{v}}
			return nil
		}
	}
	return fmt.Errorf("has version %#x; %#x was synced, and since then written: %#x", v, h.values[0], h.values[1:])
}

func remotePath(dir string) string { return filepath.Join(dir, "remote") }
func cachePath(dir string) string  { return filepath.Join(dir, "cache") }

// check looks at copies of what a child left, so that the next one finds the
// originals: pages are as invariant 2 says, and what is read is what invariant
// 1 says.
func (w *world) check(t *testing.T) {
	t.Helper()
	copied := t.TempDir()
	copyFile(t, remotePath(copied), remotePath(w.dir))
	entries, err := os.ReadDir(cachePath(w.dir))
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(cachePath(copied), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		copyFile(t, filepath.Join(cachePath(copied), e.Name()), filepath.Join(cachePath(w.dir), e.Name()))
	}
	remote, err := os.ReadFile(remotePath(copied))
	if err != nil {
		t.Fatal(err)
	}
	// The copy of the remote is another file, of another generation.
	c, err := cache.Open(cachePath(copied), identity(), cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	w.checkContent(t, overlay(t, c, remote))
}

// overlay returns what is read through the cache.
func overlay(t *testing.T, c *cache.Cache, remote []byte) []byte {
	t.Helper()
	local := make([]byte, regionSize)
	if _, err := c.Local().ReadAt(local, 0); err != nil {
		t.Fatal(err)
	}
	content := bytes.Clone(remote)
	err := c.Load(func(page, n int64, dirty bool) error {
		from, to := page*memferry.PageSize, min((page+n)*memferry.PageSize, regionSize)
		if !dirty && !bytes.Equal(local[from:to], remote[from:to]) {
			t.Errorf("pages %d+%d are clean, but differ from the remote", page, n)
		}
		copy(content[from:to], local[from:to])
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func (w *world) checkContent(t *testing.T, content []byte) {
	t.Helper()
	for c := range w.cells {
		got := content[c*cell : (c+1)*cell]
		v := binary.LittleEndian.Uint64(got)
		if !bytes.Equal(got, cellOf(v)) {
			t.Errorf("cell %d is torn", c)
			continue
		}
		if err := w.cells[c].see(v); err != nil {
			t.Errorf("cell %d (page %d) %v", c, c/pageCells, err)
		}
	}
}

// copyFile leaves holes where there are zeroes.
func copyFile(t *testing.T, to, from string) {
	t.Helper()
	p, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	err = f.Truncate(int64(len(p)))
	zero := make([]byte, memferry.PageSize)
	for off := 0; off < len(p) && err == nil; off += memferry.PageSize {
		if part := p[off:min(off+memferry.PageSize, len(p))]; !bytes.Equal(part, zero[:len(part)]) {
			_, err = f.WriteAt(part, int64(off))
		}
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func identity() cache.Identity { return cache.Identity{URL: "file:remote", Size: regionSize} }

func TestKill(t *testing.T) {
	r := testenv.Rand(t)
	w := newWorld(t)
	n := rounds
	if testing.Short() || testenv.Race {
		n = shortRounds
	}
	killed, synced := 0, 0
	for round := 0; killed < n; round++ {
		after := time.Duration(r.Int64N(int64(400 * time.Millisecond)))
		log, byUs := runChild(t, w.dir, round, after)
		for _, line := range log {
			if line == "S" {
				synced++
			}
			if err := w.hear(line); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
		}
		w.check(t)
		if t.Failed() {
			t.Fatalf("round %d, killed after %v; its last words: %q", round, after, log[max(0, len(log)-5):])
		}
		if byUs {
			killed++
		}
	}
	t.Logf("%d processes killed, %d syncs acknowledged", killed, synced)
	if synced < n {
		t.Errorf("only %d syncs were acknowledged: the test shows little", synced)
	}
	w.finish(t)
}

// finish opens the region once more, reads all of it, and closes it in order:
// afterwards the remote must have everything.
func (w *world) finish(t *testing.T) {
	t.Helper()
	reg, err := openRegion(t.Context(), w.dir)
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, regionSize)
	_, err = reg.ReadAt(content, 0)
	if err := errors.Join(err, reg.Close()); err != nil {
		t.Fatal(err)
	}
	w.checkContent(t, content)
	remote, err := os.ReadFile(remotePath(w.dir))
	if err != nil || !bytes.Equal(remote, content) {
		t.Errorf("after an orderly Close the remote has other bytes, or %v", err)
	}
}

// runChild runs a child and kills it. It returns what it said, and whether it
// was killed rather than done.
func runChild(t *testing.T, dir string, round int, after time.Duration) (log []string, killed bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), envDir+"="+dir, fmt.Sprintf("%s=%d", envRound, round))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	in := bufio.NewReader(out)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			break // a last line may be cut short: it was never acknowledged
		}
		log = append(log, strings.TrimSuffix(line, "\n"))
	}
	err = cmd.Wait()
	if err != nil && cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("round %d: the child failed: %v\n%s", round, err, stderr.String())
	}
	return log, err != nil
}

// slow is a remote that takes some time, so that work is under way whenever
// the process is killed.
type slow struct {
	memferry.Backend
	gen memferry.Generationer
}

func (s slow) pause() { time.Sleep(rand.N(2 * time.Millisecond)) }

func (s slow) ReadAt(p []byte, off int64) (int, error) {
	s.pause()
	return s.Backend.ReadAt(p, off)
}

func (s slow) WriteAt(p []byte, off int64) (int, error) {
	s.pause()
	n, err := s.Backend.WriteAt(p, off)
	s.pause()
	return n, err
}

func (s slow) Sync() error {
	s.pause()
	return s.Backend.Sync()
}

func (s slow) Generation(ctx context.Context) (string, error) { return s.gen.Generation(ctx) }

func openRegion(ctx context.Context, dir string) (*region.Region, error) {
	remote, err := file.Open(remotePath(dir), file.Options{})
	if err != nil {
		return nil, err
	}
	c, err := cache.Open(cachePath(dir), identity(), cache.Options{JournalLimit: 16 << 10})
	if err != nil {
		return nil, errors.Join(err, remote.Close())
	}
	return region.Open(ctx, slow{remote, remote}, c.Local(), region.Options{
		ChunkSize: 64 << 10, PushInterval: 20 * time.Millisecond, PushIdle: 5 * time.Millisecond,
		Store: c, Rate: 16 << 20,
	})
}
