package uffd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/region"
)

// footprint is what a process holds of memories.
type footprint struct {
	files, mappings, children int
}

func measure(t *testing.T) (f footprint) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if strings.Contains(line, "memferry") || strings.Contains(line, "(deleted)") {
			f.mappings++
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		to, err := os.Readlink("/proc/self/fd/" + fd.Name())
		if err == nil && !strings.Contains(to, "eventpoll") && !strings.Contains(to, "eventfd") && to != "/proc/self/fd" && !strings.HasSuffix(to, "/fd") {
			f.files++
		}
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		children, err := os.ReadFile("/proc/self/task/" + task.Name() + "/children")
		if err == nil { // a thread may have ended
			f.children += len(bytes.Fields(children))
		}
	}
	return f
}

// TestNothingLeft: descriptors, mappings and helpers go with their memory,
// however it ends. The package's TestMain looks for goroutines.
func TestNothingLeft(t *testing.T) {
	want := noise(t, 3<<20)
	path := sourceFile(t, want)
	ends := map[string]func(t *testing.T) *Memory{
		"closed": func(t *testing.T) *Memory {
			m := helped(t, "file:"+path, Options{})
			m.Bytes()[0]++
			return m
		},
		"never used": func(t *testing.T) *Memory { return helped(t, "file:"+path, Options{Pull: region.PullNone}) },
		"in one process": func(t *testing.T) *Memory {
			m := memory(t, source(t, want), Options{})
			m.Bytes()[0]++
			return m
		},
		"helper killed": func(t *testing.T) *Memory {
			m := helped(t, "file:"+path, Options{ReadOnly: true})
			r, ok := m.engine.(*remote)
			if !ok {
				t.Fatalf("engine is %T", m.engine)
			}
			if err := r.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			<-r.exited
			return m
		},
		"refused": func(t *testing.T) *Memory {
			if m, err := OpenURL(t.Context(), "file:"+path, Options{ChunkSize: 5}); err == nil {
				return m
			}
			if m, err := OpenURL(t.Context(), "file:/does/not/exist", Options{}); err == nil {
				return m
			}
			return nil
		},
	}
	closed(t, helped(t, "file:"+path, Options{})) // what is made once is there now
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			before := measure(t)
			for range 5 {
				m := end(t)
				if m == nil {
					continue
				}
				if now := measure(t); now.files <= before.files || now.mappings <= before.mappings {
					t.Fatalf("a memory takes nothing: %+v, before %+v", now, before) // so this test would see nothing
				}
				if err := m.Close(); err != nil && !errors.Is(err, errNoSource) {
					t.Error(err)
				}
			}
			deadline := testenv.Deadline(t, 10*time.Second)
			for now := measure(t); now != before; now = measure(t) {
				if deadline.Err() != nil {
					t.Fatalf("before %+v, now %+v", before, now)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
}

// TestFork: a child that the kernel copies the process to has the pages that
// are here; the faults of others are not served there, and it must not touch
// them. Nothing of that disturbs the parent. (Children of Go programs call exec
// at once; what is tested here is that fork itself works, and copies no locks.)
func TestFork(t *testing.T) {
	want := noise(t, 2<<20)
	m := helped(t, "slow:"+sourceFile(t, want), Options{Pull: region.PullNone, ChunkSize: 64 << 10})
	defer closed(t, m)
	for i := 0; i < len(want); i += 64 << 10 {
		if m.Bytes()[i] != want[i] {
			t.Fatalf("byte %d differs", i)
		}
		if i%(256<<10) == 0 {
			out, err := exec.Command("echo", fmt.Sprint(i)).Output()
			if err != nil || strings.TrimSpace(string(out)) != fmt.Sprint(i) {
				t.Fatalf("child: %q, %v", out, err)
			}
		}
	}
	if !bytes.Equal(m.Bytes(), want) {
		t.Error("the memory differs")
	}
}

// TestMoved: a part that was moved away is no longer served, and neither the
// server nor the rest of the memory minds; it is mapped, so it reads as the
// file does.
func TestMoved(t *testing.T) {
	want := noise(t, 4<<20)
	m := memory(t, source(t, want), Options{Pull: region.PullNone, SmallPages: true})
	const off, n = 1 << 20, 256 << 10
	if err := m.Populate(off, n); err != nil {
		t.Fatal(err)
	}
	to, err := unix.MremapPtr(pointer(m.app.data[off:off+n]), n, nil, n, unix.MREMAP_MAYMOVE|unix.MREMAP_DONTUNMAP)
	if errors.Is(err, unix.EINVAL) {
		t.Skip("this kernel can't move a part and leave its place")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.MunmapPtr(to, n); err != nil {
			t.Error(err)
		}
	}()
	if got := bytesAt(to, n); !bytes.Equal(got, want[off:off+n]) {
		t.Error("what was moved differs")
	}
	for i := range want {
		if i%pageSize == 0 && (i < off || i >= off+n) && m.Bytes()[i] != want[i] {
			t.Fatalf("byte %d of the rest differs", i)
		}
	}
}

// TestUnmappedPartWithHelper: so does a part that is replaced under a helper,
// while it is pulled.
func TestUnmappedPartWithHelper(t *testing.T) {
	want := noise(t, 4<<20)
	m := helped(t, "slow:"+sourceFile(t, want), Options{ChunkSize: 64 << 10})
	defer closed(t, m)
	const off, n = 2<<20 + 3*pageSize, 64 << 10
	hole := m.app.data[off : off+n]
	if _, err := unix.MmapPtr(-1, 0, pointer(hole), n, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
	if err := m.Wait(testenv.Deadline(t, hang)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m.Bytes()[:off], want[:off]) || !bytes.Equal(m.Bytes()[off+n:], want[off+n:]) {
		t.Error("the rest differs")
	}
	if !bytes.Equal(hole, make([]byte, n)) {
		t.Error("what was mapped in its place was written to")
	}
}
