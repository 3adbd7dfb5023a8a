package fuse

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestUncached: reads see at once what changed in the backend, and the backend
// sees writes before any fsync, without O_DIRECT; on a file as on a directory.
func TestUncached(t *testing.T) {
	for _, name := range []string{"directory", "file"} {
		t.Run(name, func(t *testing.T) {
			m := newTestMemory(t, testSize)
			at := t.TempDir()
			if name == "file" {
				at = filepath.Join(at, "region")
			}
			d := mountAt(t, m, at, Options{Uncached: true})
			f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			p := make([]byte, 10)
			for i := range byte(3) {
				m.mem[4096+3] = i + 1
				if _, err := unix.Pread(int(f.Fd()), p, 4096); err != nil || p[3] != i+1 {
					t.Fatalf("read %d, %v; want %d", p[3], err, i+1)
				}
				if _, err := unix.Pwrite(int(f.Fd()), []byte{i + 7}, 9000); err != nil || m.mem[9000] != i+7 {
					t.Fatalf("the backend has %d after a write of %d, %v", m.mem[9000], i+7, err)
				}
			}
			// What has the file's size as its end still has it.
			if _, err := unix.Pwrite(int(f.Fd()), p, testSize); err != unix.ENOSPC { //nolint:errorlint // an errno
				t.Errorf("write past the end: %v", err)
			}
			if n, err := unix.Pread(int(f.Fd()), p, testSize-4); n != 4 || err != nil {
				t.Errorf("read over the end: %d, %v", n, err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
