package integration

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
)

// TestUmountAtOnce: whoever sees the file can unmount it, however early.
func TestUmountAtOnce(t *testing.T) {
	testenv.FUSE(t)
	dir := t.TempDir()
	for i := range 50 {
		path := filepath.Join(dir, "disk")
		p := start(t, memferry, "mount", "mem:?size=1M", path)
		for end := time.Now().Add(hang); !isFUSE(path); {
			if time.Now().After(end) {
				t.Fatalf("round %d: not mounted", i)
			}
		}
		if out, err := try(t, memferry, "umount", path); err != nil {
			t.Fatalf("round %d: umount: %v\n%s", i, err, out)
		}
		<-p.done
		if p.err != nil {
			t.Fatalf("round %d: the mount ended with %v\n%s", i, p.err, p.out.String())
		}
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Fatalf("round %d: the mountpoint is left: %v", i, err)
		}
	}
}
