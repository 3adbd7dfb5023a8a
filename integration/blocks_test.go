package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/memferry/memferry/internal/testenv"
)

// TestLargeBlocks mounts an export whose server takes nothing that is not
// aligned to 64 KiB, and writes single pages and odd ranges, over and over
// within a block, so that pushes of its parts meet.
func TestLargeBlocks(t *testing.T) {
	testenv.FUSE(t)
	for _, mode := range [][]string{{"--chunk", "16K", "--push-interval", "5ms"}, {"--direct"}} {
		t.Run(mode[0], func(t *testing.T) {
			const size = 4 * mib
			want := pattern(3, size)
			disk := file(t, "disk", want)
			uri := nbdkit(t, "--filter=blocksize-policy", "file", disk, "blocksize-minimum=64K",
				"blocksize-preferred=64K", "blocksize-maximum=1M", "blocksize-error-policy=error")
			m := mount(t, uri, filepath.Join(t.TempDir(), "m"), mode...)
			f, err := os.OpenFile(m.path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			rng := testenv.Rand(t)
			for i := range 300 {
				off := rng.Int64N(4)*192*kib + rng.Int64N(128*kib)
				p := pattern(uint64(i), 1+rng.Int64N(3*4096))
				if rng.IntN(2) == 0 {
					off, p = off&^4095, pattern(uint64(i), 4096)
				}
				copy(want[off:], p)
				if _, err := f.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
				if rng.IntN(30) == 0 {
					if err := f.Sync(); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			m.umount()
			if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the source differs from what was written, or %v", err)
			}
		})
	}
}
