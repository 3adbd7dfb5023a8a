package integration

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/internal/testenv"
)

// refused runs memferry and wants a clean refusal: exit status 1 (2 for a
// usage error), one line that names the thing, no stack trace.
func refused(t *testing.T, status int, names []string, args ...string) {
	t.Helper()
	out, err := try(t, memferry, args...)
	out = strings.TrimSpace(out)
	if exitCode(err) != status {
		t.Errorf("memferry %s: exit status %d, want %d", strings.Join(args, " "), exitCode(err), status)
	}
	if strings.Contains(out, "goroutine ") || strings.Count(out, "\n") > 0 || out == "" {
		t.Errorf("memferry %s should say one line, but says:\n%s", strings.Join(args, " "), out)
	}
	for _, n := range names {
		if !strings.Contains(out, n) {
			t.Errorf("memferry %s does not name %q:\n%s", strings.Join(args, " "), n, out)
		}
	}
	t.Log(out)
}

func TestBadInput(t *testing.T) {
	testenv.FUSE(t)
	disk := file(t, "disk", pattern(50, mib))
	s := serve(t, "disk="+disk)
	notNBD := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(notNBD.Close)
	at := filepath.Join(t.TempDir(), "at")

	t.Run("unknown scheme", func(t *testing.T) {
		refused(t, 1, []string{"gopher"}, "info", "gopher://host/disk")
	})
	t.Run("unknown parameter", func(t *testing.T) {
		refused(t, 1, []string{"sise"}, "info", "mem:?sise=1G")
	})
	t.Run("missing file", func(t *testing.T) {
		refused(t, 1, []string{"no-such-file"}, "info", filepath.Join(t.TempDir(), "no-such-file"))
	})
	t.Run("missing export", func(t *testing.T) {
		refused(t, 1, []string{"no-such-export"}, "mount", s.uri("no-such-export"), at)
	})
	t.Run("nobody there", func(t *testing.T) {
		refused(t, 1, []string{"/nowhere"}, "mount", "--io-timeout=2s", unixURI("/nowhere", "disk"), at)
	})
	t.Run("not NBD", func(t *testing.T) {
		host := strings.TrimPrefix(notNBD.URL, "http://")
		refused(t, 1, []string{host}, "info", "nbd://"+host+"/disk")
	})
	t.Run("usage", func(t *testing.T) {
		if out, err := try(t, memferry, "mount", "--no-such-flag"); exitCode(err) != 2 {
			t.Errorf("exit status %d, want 2:\n%s", exitCode(err), out)
		}
	})
	t.Run("mountpoint missing directory", func(t *testing.T) {
		refused(t, 1, []string{"no-such-dir"}, "mount", s.uri("disk"), filepath.Join(t.TempDir(), "no-such-dir", "disk"))
	})
	t.Run("mountpoint in use", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "disk")
		m := mount(t, s.uri("disk"), path)
		refused(t, 1, []string{path}, "mount", s.uri("disk"), path)
		same(t, path, disk) // the first one is not disturbed
		m.umount()
	})
	t.Run("umount of nothing", func(t *testing.T) {
		refused(t, 1, []string{disk}, "umount", disk)
	})
	if isFUSE(at) {
		t.Errorf("%s is mounted", at)
	}
}

func TestOddSize(t *testing.T) {
	content := pattern(51, mib+12345)
	disk := file(t, "disk", content)
	s := serve(t, "disk="+disk)
	m := mount(t, s.uri("disk"), filepath.Join(t.TempDir(), "disk"))
	same(t, m.path, disk)
	patch(t, m.path, mib+12345-7, []byte("the end"))
	copy(content[len(content)-7:], "the end")
	m.umount()
	holds(t, disk, content)

	// A server with blocks of 4 KiB that its size is no multiple of.
	uri := nbdkit(t, "--filter=blocksize-policy", "file", disk, "blocksize-minimum=4096",
		"blocksize-preferred=4096", "blocksize-maximum=1M", "blocksize-error-policy=error")
	refused(t, 1, nil, "info", uri)
}

func TestReadOnlyRemote(t *testing.T) {
	testenv.FUSE(t)
	content := pattern(52, mib)
	disk := file(t, "disk", content)
	s := serve(t, "--read-only", "disk="+disk)
	m := mount(t, s.uri("disk"), filepath.Join(t.TempDir(), "disk"))
	f, err := os.OpenFile(m.path, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("x"), 0)
		if err == nil {
			err = f.Sync()
		}
		f.Close()
	}
	if !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EACCES) {
		t.Errorf("writing to a read-only remote: %v, want EROFS", err)
	}
	m.umount()
	holds(t, disk, content)
	refused(t, 1, nil, "copy", disk, s.uri("disk"))
}

// TestRemoteChanged: a cache is not mixed with another version of its remote.
func TestRemoteChanged(t *testing.T) {
	content := pattern(53, 4*mib)
	disk := file(t, "disk", content)
	cache := filepath.Join(t.TempDir(), "cache")
	path := filepath.Join(t.TempDir(), "disk")
	s := serve(t, "disk="+disk)
	m := mount(t, s.uri("disk"), path, "--cache", cache)
	same(t, path, disk)
	m.umount()
	if err := s.stop(); err != nil {
		t.Errorf("serve: %v", err)
	}

	t.Run("content", func(t *testing.T) {
		patch(t, disk, mib, []byte("changed behind our back"))
		s := serveAt(t, s.socket, "disk="+disk)
		refused(t, 1, []string{"changed"}, "mount", "--cache", cache, s.uri("disk"), path)
	})
	t.Run("size", func(t *testing.T) {
		if err := os.Truncate(disk, 2*mib); err != nil {
			t.Fatal(err)
		}
		s := serveAt(t, s.socket, "disk="+disk)
		refused(t, 1, nil, "mount", "--cache", cache, s.uri("disk"), path)
	})
	t.Run("another remote", func(t *testing.T) {
		s := serve(t, "other="+disk)
		refused(t, 1, []string{cache}, "mount", "--cache", cache, s.uri("other"), path)
	})
}

// TestDamagedCache: a state file that fails its checks is refused.
func TestDamagedCache(t *testing.T) {
	disk := file(t, "disk", pattern(54, 4*mib))
	cache := filepath.Join(t.TempDir(), "cache")
	path := filepath.Join(t.TempDir(), "disk")
	s := serve(t, "disk="+disk)
	m := mount(t, s.uri("disk"), path, "--cache", cache)
	same(t, path, disk)
	m.umount()
	entries, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	damaged := 0
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || info.Size() == 0 || info.Size() >= 4*mib {
			continue // the data, the lock
		}
		name := filepath.Join(cache, e.Name())
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i := range b {
			if i%50 == 25 {
				b[i] ^= 0x40
			}
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		damaged++
	}
	if damaged == 0 {
		t.Fatalf("found no state file in %v", entries)
	}
	refused(t, 1, []string{cache}, "mount", "--cache", cache, s.uri("disk"), path)
}

// TestCacheInUse: one process at a time.
func TestCacheInUse(t *testing.T) {
	disk := file(t, "disk", pattern(55, mib))
	cache := filepath.Join(t.TempDir(), "cache")
	s := serve(t, "disk="+disk)
	m := mount(t, s.uri("disk"), filepath.Join(t.TempDir(), "disk"), "--cache", cache)
	refused(t, 1, []string{cache}, "mount", "--cache", cache, s.uri("disk"), filepath.Join(t.TempDir(), "second"))
	m.umount()
}

// TestFullCacheDisk: reads go on, writes say ENOSPC, nothing that fsync
// acknowledged is lost.
func TestFullCacheDisk(t *testing.T) {
	testenv.FUSE(t)
	small := testenv.Tmpfs(t, 8*mib)
	content := pattern(56, 32*mib)
	disk := file(t, "disk", content)
	s := serve(t, "disk="+disk)
	_, socket := link(t, s.socket, netsim.Link{})
	m := mount(t, unixURI(socket, "disk"), filepath.Join(t.TempDir(), "disk"), "--cache", filepath.Join(small, "cache"))
	same(t, m.path, disk)

	f, err := os.OpenFile(m.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	failed := int64(-1) // offset of the write that found the disk full
	for off := int64(0); off < 32*mib && failed < 0; off += mib {
		p := pattern(uint64(off), mib)
		_, err := f.WriteAt(p, off)
		if err == nil {
			err = f.Sync()
		}
		switch {
		case err == nil:
			copy(content[off:], p)
		case errors.Is(err, unix.ENOSPC):
			failed = off
		default:
			t.Fatalf("a write with a full cache disk: %v, want ENOSPC", err)
		}
	}
	if failed < 0 {
		t.Error("32 MiB were written to a disk of 8 MiB")
	}
	f.Close()
	out, err := try(t, memferry, "umount", m.path)
	if isFUSE(m.path) {
		t.Error("still mounted")
	}
	// The cache may have no room to note that it was closed.
	if out = strings.TrimSpace(out); err != nil && (strings.Count(out, "\n") > 0 || !strings.Contains(out, small) || !strings.Contains(out, "no acknowledged write is lost") || !strings.Contains(out, "; free some space")) {
		t.Errorf("umount: %v, want one line that names the cache and the remedy:\n%s", err, out)
	}
	t.Log(out)
	// What was written in part when the disk was full may be either; the rest
	// must be what was acknowledged.
	got, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if failed >= 0 {
		copy(content[failed:], got[failed:failed+mib])
	}
	holds(t, disk, content)

	// And with some room again the cache is of use.
	if err := unix.Mount("", small, "", unix.MS_REMOUNT, "size=64M"); err != nil {
		t.Fatal(err)
	}
	m = mount(t, unixURI(socket, "disk"), m.path, "--cache", filepath.Join(small, "cache"))
	holds(t, m.path, content)
	m.umount()
}
