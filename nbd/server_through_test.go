package nbd

import (
	"bytes"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// memoryFile is a file in memory that counts its writes, and can fail at one.
type memoryFile struct {
	*plain
	f       *os.File
	longest atomic.Int64
	fail    int64 // writes at this offset fail; 0: none
}

func newMemoryFile(t *testing.T, size int) *memoryFile {
	f, err := os.Create(filepath.Join(testenv.Tmpfs(t, int64(4*size)), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	return &memoryFile{plain: newPlain(size), f: f}
}

func (m *memoryFile) File() *os.File { return m.f }

func (m *memoryFile) WriteAt(p []byte, off int64) (int, error) {
	m.longest.Store(max(m.longest.Load(), int64(len(p))))
	if m.fail != 0 && off == m.fail {
		return 0, memferry.ErrNoSpace
	}
	return m.plain.WriteAt(p, off)
}

// TestWriteThrough: a large payload for a file in memory passes through one
// piece of memory, and keeps the stream in step whatever the backend says.
func TestWriteThrough(t *testing.T) {
	const size = 8 << 20
	m := newMemoryFile(t, size)
	s := startServer(t, ServerOptions{}, Export{Name: "d", Backend: m})
	w := connect(t, s)
	w.enter("d", false)
	want := make([]byte, size)
	put := func(fill byte, off, n int, errno Errno) {
		t.Helper()
		p := bytes.Repeat([]byte{fill}, n)
		if a := w.ask(request{typ: cmdWrite, offset: uint64(off), length: uint32(n)}, p...); a.errno != errno {
			t.Fatalf("write of %d at %d: %v, want %v", n, off, a.errno, errno)
		}
		if errno == 0 {
			copy(want[off:], p)
		}
	}
	for i, c := range [][2]int{{0, throughPiece + 1}, {4096, 1 << 20}, {3<<20 + 512, 3<<20 + 7}, {size - throughPiece - 5, throughPiece + 5}, {5, 2 * throughPiece}} {
		put(byte(i)+1, c[0], c[1], 0)
	}
	if !bytes.Equal(m.bytes(0, size), want) {
		t.Error("wrong bytes")
	}
	if n := m.longest.Load(); n != throughPiece {
		t.Errorf("the longest piece has %d bytes, want %d", n, throughPiece)
	}
	// An error in the middle is the reply, once the payload has been taken.
	m.fail = 2 << 20
	put(50, int(m.fail)-3*throughPiece, 6*throughPiece, ENOSPC)
	m.fail = 0
	put(51, 4<<20, 1<<20, 0)
	if got := m.bytes(4<<20, 1<<20); !bytes.Equal(got, want[4<<20:5<<20]) {
		t.Error("wrong bytes after an error")
	}
	if n := s.Stats().Memory; n != 0 {
		t.Errorf("%d bytes of memory in use", n)
	}
}
