package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/testenv"
)

// need skips the test without the programs it talks to.
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		testenv.Program(t, p)
	}
}

func TestServerNbdinfo(t *testing.T) {
	need(t, "nbdinfo")
	disk := file(t, "disk", pattern(1, 8*mib))
	s := serve(t, "disk="+disk, "mem=mem:?size=1G")

	t.Run("text", func(t *testing.T) {
		out := run(t, "nbdinfo", s.uri("disk"))
		for _, want := range []string{"protocol: newstyle-fixed", "export-size: 8388608", "is_read_only: false"} {
			if !strings.Contains(out, want) {
				t.Errorf("nbdinfo does not say %q:\n%s", want, out)
			}
		}
	})
	t.Run("json", func(t *testing.T) {
		type export struct {
			Name      string   `json:"export-name"`
			Size      int64    `json:"export-size"`
			Flush     bool     `json:"can_flush"`
			FUA       bool     `json:"can_fua"`
			Trim      bool     `json:"can_trim"`
			Zero      bool     `json:"can_zero"`
			DF        bool     `json:"can_df"`
			MultiConn bool     `json:"can_multi_conn"`
			ReadOnly  bool     `json:"is_read_only"`
			Contexts  []string `json:"contexts"`
		}
		var info struct {
			Structured bool     `json:"structured"`
			Exports    []export `json:"exports"`
		}
		out := output(t, "nbdinfo", "--json", s.uri("mem"))
		if err := json.Unmarshal(out, &info); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if !info.Structured || len(info.Exports) != 1 {
			t.Fatalf("no structured replies, or not one export:\n%s", out)
		}
		e := info.Exports[0]
		if e.Size != 1<<30 || !e.Flush || !e.FUA || !e.Trim || !e.Zero || !e.DF || !e.MultiConn || e.ReadOnly {
			t.Errorf("the mem backend is announced as %+v", e)
		}
		if !strings.Contains(strings.Join(e.Contexts, " "), "base:allocation") {
			t.Errorf("contexts %q lack base:allocation", e.Contexts)
		}
	})
	t.Run("list", func(t *testing.T) {
		out := run(t, "nbdinfo", "--list", s.uri(""))
		for _, want := range []string{`export="disk"`, `export="mem"`} {
			if !strings.Contains(out, want) {
				t.Errorf("nbdinfo --list does not say %q:\n%s", want, out)
			}
		}
	})
	t.Run("missing export", func(t *testing.T) {
		if out, err := try(t, "nbdinfo", s.uri("no-such")); err == nil {
			t.Errorf("an export that isn't there was opened:\n%s", out)
		}
	})
}

// extent is one of "nbdinfo --map --json" or "qemu-img map --output=json".
type extent struct {
	Offset int64 `json:"offset"`
	Start  int64 `json:"start"`
	Length int64 `json:"length"`
	Type   int   `json:"type"` // bits of base:allocation: 1 hole, 2 zero
	Data   bool  `json:"data"`
	Zero   bool  `json:"zero"`
}

func TestServerMap(t *testing.T) {
	need(t, "nbdinfo", "qemu-img")
	disk := sparse(t, 8*mib, map[int64][]byte{0: pattern(1, mib), 6 * mib: pattern(2, 64*kib)})
	s := serve(t, "file="+disk, "mem=mem:?size=8M")
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", disk, s.uri("mem"))

	for _, name := range []string{"file", "mem"} {
		t.Run(name, func(t *testing.T) {
			var m []extent
			if err := json.Unmarshal(output(t, "nbdinfo", "--map", "--json", s.uri(name)), &m); err != nil {
				t.Fatal(err)
			}
			checkMap(t, m, func(e extent) (off int64, hole bool) { return e.Offset, e.Type&2 != 0 })

			m = nil
			if err := json.Unmarshal(output(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri(name)), &m); err != nil {
				t.Fatal(err)
			}
			checkMap(t, m, func(e extent) (off int64, hole bool) { return e.Start, e.Zero })
		})
	}
}

// checkMap checks the map of TestServerMap's disk: data where there is data,
// and most of the rest known to be zero.
func checkMap(t *testing.T, m []extent, kind func(extent) (off int64, zero bool)) {
	t.Helper()
	var end, zeroes int64
	for _, e := range m {
		off, zero := kind(e)
		if off != end {
			t.Fatalf("extent at %d follows one that ends at %d: %+v", off, end, m)
		}
		end += e.Length
		if !zero {
			continue
		}
		zeroes += e.Length
		if off < mib || off < 6*mib+64*kib && end > 6*mib {
			t.Errorf("[%d, %d) is called zero, but has data", off, end)
		}
	}
	if end != 8*mib || zeroes < 6*mib {
		t.Errorf("the map covers %d bytes, %d of them zero: %+v", end, zeroes, m)
	}
}

func TestServerNbdcopy(t *testing.T) {
	need(t, "nbdcopy")
	content := pattern(3, 32*mib+512)
	for _, connections := range []string{"1", "4"} {
		t.Run("connections="+connections, func(t *testing.T) {
			src, dst := file(t, "src", content), sparse(t, int64(len(content)), nil)
			back := filepath.Join(t.TempDir(), "back")
			s := serve(t, "src="+src, "dst="+dst, fmt.Sprintf("mem=mem:?size=%d", len(content)))

			run(t, "nbdcopy", "--connections="+connections, s.uri("src"), back)
			holds(t, back, content)
			run(t, "nbdcopy", "--connections="+connections, "--flush", back, s.uri("dst"))
			holds(t, dst, content)
			run(t, "nbdcopy", "--connections="+connections, s.uri("dst"), s.uri("mem"))
			run(t, "nbdcopy", "--connections="+connections, s.uri("mem"), back)
			holds(t, back, content)
		})
	}
}

func TestServerQemuImg(t *testing.T) {
	need(t, "qemu-img")
	content := pattern(4, 16*mib)
	src := file(t, "src", content)
	dst := sparse(t, 16*mib, map[int64][]byte{4 * mib: pattern(5, mib)})
	s := serve(t, "src="+src, "dst="+dst)

	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal(output(t, "qemu-img", "info", "-f", "raw", "--output=json", s.uri("src")), &info); err != nil {
		t.Fatal(err)
	}
	if info.Size != 16*mib {
		t.Errorf("qemu-img info: size %d", info.Size)
	}
	if _, err := try(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, s.uri("dst")); exitCode(err) != 1 {
		t.Errorf("qemu-img compare of different images: %v, want exit status 1", err)
	}
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", s.uri("src"), s.uri("dst"))
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, s.uri("dst"))
	holds(t, dst, content)

	qcow := filepath.Join(t.TempDir(), "image.qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri("dst"), qcow)
	run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", qcow, s.uri("src"))
}

func TestServerQemuIO(t *testing.T) {
	need(t, "qemu-io")
	for _, kind := range []string{"file", "mem"} {
		t.Run(kind, func(t *testing.T) {
			content := pattern(6, 4*mib)
			disk := file(t, "disk", content)
			s := serve(t, "file="+disk, "mem=mem:?size=4M")
			out := run(t, "qemu-io", "-f", "raw",
				"-c", "write -P 0xaa 0 128k",
				"-c", "write -z 64k 64k", // may leave a hole
				"-c", "write -P 0xcc 1M 128k", //
				"-c", "write -z -u 1M 64k", // may unmap
				"-c", "write -f -P 0xbb 256k 4k", // FUA
				"-c", "write -P 0xdd 2M 64k", //
				"-c", "discard 2M 64k", //
				"-c", "flush", //
				"-c", "read -P 0xaa 0 64k", // and read it all back
				"-c", "read -P 0 64k 64k", //
				"-c", "read -P 0xbb 256k 4k", //
				"-c", "read -P 0 1M 64k", //
				"-c", "read -P 0xcc 1088k 64k", //
				"-c", "aio_write -P 0x11 3M 512k", // many at once
				"-c", "aio_write -P 0x22 3584k 4k", //
				"-c", "aio_flush",
				"-c", "read -P 0x11 3M 512k",
				s.uri(kind))
			if strings.Contains(out, "failed") || strings.Contains(out, "error") {
				t.Errorf("qemu-io:\n%s", out)
			}
			if kind != "file" {
				return
			}
			got, err := os.ReadFile(disk)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got[256*kib:260*kib], bytes.Repeat([]byte{0xbb}, 4096)) {
				t.Error("what was written with FUA is not in the file")
			}
			if !bytes.Equal(got[300*kib:mib], content[300*kib:mib]) {
				t.Error("bytes that nobody wrote have changed")
			}
		})
	}
}

// TestServerDiscardFrees: a discard gives the storage back.
func TestServerDiscardFrees(t *testing.T) {
	need(t, "qemu-io")
	disk := file(t, "disk", pattern(7, 4*mib))
	s := serve(t, "disk="+disk)
	before := allocated(t, disk)
	run(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 1M 2M", "-c", "flush", s.uri("disk"))
	if after := allocated(t, disk); after > before-2*mib {
		t.Errorf("%d bytes allocated before the discard of 2 MiB, %d after", before, after)
	}
}

func allocated(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestServerNbdClientList(t *testing.T) {
	client := program(t, "nbd-client")
	_, addr := serveTCP(t, "first=mem:?size=1M", "second=mem:?size=1M")
	host, port, _ := strings.Cut(addr, ":")
	out := run(t, client, "-l", host, port)
	if !strings.Contains(out, "first") || !strings.Contains(out, "second") {
		t.Errorf("nbd-client -l:\n%s", out)
	}
}

// program is testenv.Program that also looks where Debian puts programs that
// administrators use.
func program(t testing.TB, name string) string {
	t.Helper()
	if path := filepath.Join("/usr/sbin", name); unix.Access(path, unix.X_OK) == nil {
		return path
	}
	return testenv.Program(t, name)
}

func TestServerFio(t *testing.T) {
	need(t, "fio")
	disk := sparse(t, 32*mib, nil)
	s := serve(t, "file="+disk, "mem=mem:?size=32M")
	for _, kind := range []string{"file", "mem"} {
		for _, depth := range []string{"1", "32"} {
			t.Run(kind+"/depth="+depth, func(t *testing.T) {
				run(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+s.uri(kind), "--rw=randwrite",
					"--bsrange=4k-256k", "--blockalign=4k", "--size=32M", "--iodepth="+depth, "--fsync=16",
					"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--randrepeat=1", "--group_reporting")
			})
		}
	}
}

func TestServerNbdfuse(t *testing.T) {
	testenv.FUSE(t)
	need(t, "nbdfuse", "fusermount3")
	content := pattern(8, 16*mib)
	disk := file(t, "disk", content)
	s := serve(t, "disk="+disk)
	dir := t.TempDir()
	p := start(t, "nbdfuse", filepath.Join(dir, "nbd"), s.uri("disk"))
	t.Cleanup(func() {
		if isFUSE(dir) {
			run(t, "fusermount3", "-u", dir)
			<-p.done
		}
	})
	p.eventually("nbdfuse", func() error {
		info, err := os.Stat(filepath.Join(dir, "nbd"))
		if err == nil && info.Size() != int64(len(content)) {
			err = fmt.Errorf("size %d", info.Size())
		}
		return err
	})
	holds(t, filepath.Join(dir, "nbd"), content)
}

// isFUSE tells whether path lies on a FUSE file system, its root included.
func isFUSE(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.FUSE_SUPER_MAGIC
}
