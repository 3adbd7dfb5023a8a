package integration

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/nbd"

	root "github.com/memferry/memferry"
)

// nbdkit starts nbdkit on a UNIX socket and returns its URI.
func nbdkit(t testing.TB, args ...string) string {
	t.Helper()
	socket := testenv.TempSocket(t)
	p := start(t, testenv.Program(t, "nbdkit"), append([]string{"-f", "--exit-with-parent", "-U", socket}, args...)...)
	p.eventually("nbdkit", accepts("unix", socket))
	return unixURI(socket, "")
}

// qemuNBD starts qemu-nbd on a UNIX socket and returns its URI.
func qemuNBD(t testing.TB, args ...string) string {
	t.Helper()
	socket := testenv.TempSocket(t)
	p := start(t, testenv.Program(t, "qemu-nbd"), append([]string{"-k", socket, "-t", "-e", "16"}, args...)...)
	p.eventually("qemu-nbd", accepts("unix", socket))
	return unixURI(socket, "")
}

// dial opens an export with the library's client.
func dial(t testing.TB, uri string, o nbd.ClientOptions) *nbd.Client {
	t.Helper()
	u, err := nbd.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	c, err := nbd.Dial(testenv.Deadline(t, hang), u, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

// checkReads compares reads of all kinds of alignment with what should be there.
func checkReads(t *testing.T, b io.ReaderAt, want []byte) {
	t.Helper()
	size := int64(len(want))
	for _, r := range []struct{ off, n int64 }{
		{0, 1}, {1, 511}, {511, 2}, {4095, 4098}, {size / 2, size/4 + 17}, {size - 1, 1}, {size - 4097, 4097}, {0, size},
	} {
		got := make([]byte, r.n)
		if n, err := b.ReadAt(got, r.off); err != nil || int64(n) != r.n {
			t.Errorf("ReadAt(%d bytes, %d) = %d, %v", r.n, r.off, n, err)
		} else if !bytes.Equal(got, want[r.off:r.off+r.n]) {
			t.Errorf("ReadAt(%d bytes, %d): wrong bytes", r.n, r.off)
		}
	}
	got := make([]byte, 100)
	if n, err := b.ReadAt(got, size-10); n != 10 || !errors.Is(err, io.EOF) {
		t.Errorf("a read past the end: %d, %v, want 10 bytes and io.EOF", n, err)
	}
}

// checkWrites writes in all kinds of alignment, and keeps the model in step.
func checkWrites(t *testing.T, b root.Backend, model []byte) {
	t.Helper()
	size := int64(len(model))
	for i, w := range []struct{ off, n int64 }{
		{0, 1}, {3, 511}, {4095, 2}, {8192, 4096}, {size / 2, size/4 + 5}, {size - 1, 1},
	} {
		p := pattern(uint64(100+i), w.n)
		if n, err := b.WriteAt(p, w.off); err != nil || int64(n) != w.n {
			t.Errorf("WriteAt(%d bytes, %d) = %d, %v", w.n, w.off, n, err)
		}
		copy(model[w.off:], p)
	}
	if err := b.Sync(); err != nil {
		t.Errorf("Sync: %v", err)
	}
}

// TestClient: our client against the servers that others wrote, as they come
// and with the quirks that their options give them.
func TestClient(t *testing.T) {
	const size = 8 * mib
	servers := []struct {
		name  string
		start func(t *testing.T, disk string) (uri string)
	}{
		{"nbdkit memory", func(t *testing.T, disk string) string {
			uri := nbdkit(t, "memory", "8M")
			run(t, testenv.Program(t, "nbdcopy"), disk, uri)
			return uri
		}},
		{"nbdkit file", func(t *testing.T, disk string) string { return nbdkit(t, "file", disk) }},
		{"nbdkit without structured replies", func(t *testing.T, disk string) string {
			return nbdkit(t, "--no-sr", "file", disk)
		}},
		{"nbdkit with one connection", func(t *testing.T, disk string) string {
			return nbdkit(t, "--filter=multi-conn", "file", disk, "multi-conn-mode=disable")
		}},
		{"nbdkit with block sizes", func(t *testing.T, disk string) string {
			return nbdkit(t, "--filter=blocksize-policy", "file", disk, "blocksize-minimum=512",
				"blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error")
		}},
		{"nbdkit with delay", func(t *testing.T, disk string) string {
			return nbdkit(t, "--filter=delay", "file", disk, "delay-read=5ms", "delay-write=5ms")
		}},
		{"nbdkit without zero, trim, extents", func(t *testing.T, disk string) string {
			return nbdkit(t, "--filter=nozero", "--filter=noextents", "file", disk, "zeromode=notrim")
		}},
		{"nbdkit answering in pieces", func(t *testing.T, disk string) string {
			return nbdkit(t, "--filter=noparallel", "file", disk)
		}},
		{"qemu-nbd", func(t *testing.T, disk string) string { return qemuNBD(t, "-f", "raw", disk) }},
		{"qemu-nbd with io_uring off and cache", func(t *testing.T, disk string) string {
			return qemuNBD(t, "-f", "raw", "--cache=writeback", "--discard=unmap", "--detect-zeroes=unmap", disk)
		}},
	}
	for _, s := range servers {
		for _, connections := range []int{1, 4} {
			t.Run(s.name+map[int]string{1: ", alone", 4: ", 4 connections"}[connections], func(t *testing.T) {
				model := pattern(10, size)
				disk := file(t, "disk", model)
				c := dial(t, s.start(t, disk), nbd.ClientOptions{Connections: connections})
				if c.Size() != size {
					t.Fatalf("size %d, want %d", c.Size(), size)
				}
				checkReads(t, c, model)
				checkWrites(t, c, model)
				caps := root.CapabilitiesOf(c)
				if err := c.Fence(t.Context(), c.Session()); caps.Fencer != nil || !errors.Is(err, root.ErrNotSupported) {
					t.Errorf("a fence by a server that knows none: %v, capability %v", err, caps.Fencer)
				}
				if z := caps.ZeroWriter; z != nil {
					if err := z.WriteZeroes(mib, 64*kib, 0); err != nil {
						t.Errorf("WriteZeroes: %v", err)
					}
					clear(model[mib : mib+64*kib])
				}
				checkReads(t, c, model)
				checkExtents(t, caps.Extenter, size)
			})
		}
	}
}

// checkExtents walks the whole backend.
func checkExtents(t *testing.T, e root.Extenter, size int64) {
	t.Helper()
	if e == nil {
		return
	}
	for off := int64(0); off < size; {
		run, err := e.Extents(t.Context(), off, size-off)
		if err != nil || len(run) == 0 {
			t.Fatalf("Extents(%d) = %v, %v", off, run, err)
		}
		for _, x := range run {
			if x.Off != off || x.Len <= 0 || x.Off+x.Len > size {
				t.Fatalf("extent %+v, want one from %d", x, off)
			}
			off += x.Len
		}
	}
}

func TestClientReadOnly(t *testing.T) {
	disk := file(t, "disk", pattern(11, mib))
	for name, start := range map[string]func(t *testing.T) string{
		"nbdkit":   func(t *testing.T) string { return nbdkit(t, "-r", "file", disk) },
		"qemu-nbd": func(t *testing.T) string { return qemuNBD(t, "-r", "-f", "raw", disk) },
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, start(t), nbd.ClientOptions{})
			if !root.CapabilitiesOf(c).ReadOnly {
				t.Error("the export does not say that it is read-only")
			}
			if _, err := c.WriteAt([]byte{1}, 0); !errors.Is(err, root.ErrReadOnly) {
				t.Errorf("WriteAt: %v, want ErrReadOnly", err)
			}
		})
	}
}

// TestClientServerErrors: an error that the server reports reaches the caller,
// and the connection goes on.
func TestClientServerErrors(t *testing.T) {
	content := pattern(12, 4*mib)
	disk := file(t, "disk", content)
	trigger := filepath.Join(t.TempDir(), "fail")
	uri := nbdkit(t, "--filter=error", "file", disk, "error=ENOSPC", "error-rate=100%", "error-file="+trigger)
	c := dial(t, uri, nbd.ClientOptions{Connections: 2})
	checkReads(t, c, content)

	if err := os.WriteFile(trigger, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt(make([]byte, 4096), 0); !errors.Is(err, root.ErrNoSpace) {
		t.Errorf("WriteAt on a full disk: %v, want ErrNoSpace", err)
	}
	if _, err := c.ReadAt(make([]byte, 4096), 0); err == nil {
		t.Error("a failed read returned no error")
	}
	back := filepath.Join(t.TempDir(), "back")
	out, err := try(t, memferry, "copy", uri, back)
	if exitCode(err) != 1 || strings.Contains(out, "goroutine ") {
		t.Errorf("copy from a failing server: %v\n%s", err, out)
	}

	if err := os.Remove(trigger); err != nil {
		t.Fatal(err)
	}
	checkReads(t, c, content)
	run(t, memferry, "copy", uri, back)
	holds(t, back, content)
}

// TestClientLog: what we ask reaches the server as we meant it.
func TestClientLog(t *testing.T) {
	disk := file(t, "disk", pattern(13, mib))
	log := filepath.Join(t.TempDir(), "log")
	c := dial(t, nbdkit(t, "--filter=log", "file", disk, "logfile="+log), nbd.ClientOptions{Connections: 1})
	if _, err := c.WriteAt(make([]byte, 8192), 4096); err != nil {
		t.Fatal(err)
	}
	if err := c.Sync(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	write, flush := strings.Index(string(text), "Write "), strings.Index(string(text), "Flush ")
	if write < 0 || flush < write || !strings.Contains(string(text), "offset=0x1000 count=0x2000") {
		t.Errorf("nbdkit's log lacks the write, or a flush after it:\n%s", text)
	}
}

// TestClientRefuses: servers we can't talk to are refused with an error, soon.
func TestClientRefuses(t *testing.T) {
	for name, uri := range map[string]func(t *testing.T) string{
		"oldstyle":       func(t *testing.T) string { return nbdkit(t, "-o", "memory", "1M") },
		"missing export": func(t *testing.T) string { return qemuNBD(t, "-x", "here", "-f", "raw", file(t, "d", pattern(1, mib))) },
		"TLS required":   func(t *testing.T) string { return nbdkit(t, "--tls=require", "--tls-psk="+psk(t), "memory", "1M") },
	} {
		t.Run(name, func(t *testing.T) {
			u, err := nbd.ParseURI(uri(t))
			if err != nil {
				t.Fatal(err)
			}
			c, err := nbd.Dial(testenv.Deadline(t, hang), u, nbd.ClientOptions{IOTimeout: 5 * time.Second})
			if err == nil {
				c.Close()
				t.Fatal("no error")
			}
			if errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("it took until the deadline: %v", err)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has more than one line: %v", err)
			}
			t.Log(err)
		})
	}
}

// psk writes a file of pre-shared keys for nbdkit.
func psk(t testing.TB) string {
	return file(t, "psk", []byte("user:0123456789abcdef0123456789abcdef\n"))
}

// TestCopy: memferry copy between what it can open and other people's servers.
func TestCopy(t *testing.T) {
	content := pattern(14, 24*mib+4096)
	src := file(t, "src", content)
	dst := sparse(t, int64(len(content)), nil)
	in := nbdkit(t, "file", src)
	out := qemuNBD(t, "-f", "raw", dst)
	back := filepath.Join(t.TempDir(), "back")

	run(t, memferry, "copy", in, out)
	run(t, memferry, "copy", out, back)
	holds(t, back, content)
	holds(t, dst, content)
}

// TestCopySparse: holes of the source stay holes.
func TestCopySparse(t *testing.T) {
	src := sparse(t, 256*mib, map[int64][]byte{100 * mib: pattern(15, mib)})
	back := filepath.Join(t.TempDir(), "back")
	run(t, memferry, "copy", nbdkit(t, "file", src), back)
	same(t, back, src)
	if n := allocated(t, back); n > 8*mib {
		t.Errorf("the copy of 1 MiB of data takes %d bytes", n)
	}
}

func TestInfo(t *testing.T) {
	uri := qemuNBD(t, "-x", "disk", "-D", "a description", "-f", "raw", file(t, "d", pattern(1, mib)))
	uri = strings.Replace(uri, "nbd+unix:///", "nbd+unix:///disk", 1)
	if out := run(t, memferry, "info", uri); !strings.Contains(out, "1 MiB") && !strings.Contains(out, "1048576") {
		t.Errorf("info does not tell the size:\n%s", out)
	}
}
