package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/memferry/memferry/internal/testenv"
)

// run runs a program and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	out, err := exec.CommandContext(ctx, testenv.Program(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func uri(addr, name string) string { return "nbd+unix:///" + name + "?socket=" + addr }

func TestNbdinfo(t *testing.T) {
	testenv.Program(t, "nbdinfo")
	a := newAble(testSize)
	clear(a.data[8192 : 8192+40960])
	s := startServer(t, ServerOptions{}, Export{Name: "a", Description: "the first", Backend: a}, Export{Name: "b", Backend: newPlain(testSize), ReadOnly: true})
	addr, _ := serve(t, s)
	var info struct {
		Protocol string
		Exports  []struct {
			Name        string `json:"export-name"`
			Description string
			Contexts    []string
			ReadOnly    bool  `json:"is_read_only"`
			MultiConn   bool  `json:"can_multi_conn"`
			Trim        bool  `json:"can_trim"`
			Size        int64 `json:"export-size"`
		}
	}
	out := run(t, "nbdinfo", "--list", "--json", uri(addr, ""))
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v in\n%s", err, out)
	}
	if len(info.Exports) != 2 || info.Protocol != "newstyle-fixed" {
		t.Fatalf("%+v", info)
	}
	x, y := info.Exports[0], info.Exports[1]
	if x.Name != "a" || x.Description != "the first" || x.ReadOnly || !x.MultiConn || !x.Trim || x.Size != testSize {
		t.Errorf("export a: %+v", x)
	}
	if y.Name != "b" || !y.ReadOnly || y.Trim || len(y.Contexts) != 0 {
		t.Errorf("export b: %+v", y)
	}
	var extents []struct {
		Offset, Length int64
		Type           int
	}
	out = run(t, "nbdinfo", "--map", "--json", uri(addr, "a"))
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v in\n%s", err, out)
	}
	if got := fmt.Sprint(extents); got != "[{0 8192 0} {8192 40960 3} {49152 999424 0}]" {
		t.Errorf("map %s", got)
	}
}

func TestNbdcopy(t *testing.T) {
	testenv.Program(t, "nbdcopy")
	const size = 8 << 20
	data := newPattern(size).data
	source := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(source, data, 0o600); err != nil {
		t.Fatal(err)
	}
	v, p := newViewed(size), newPlain(size)
	clear(v.data)
	s := startServer(t, ServerOptions{}, Export{Name: "viewed", Backend: v}, Export{Name: "plain", Backend: p})
	addr, _ := serve(t, s)
	for name, got := range map[string]func() []byte{
		"viewed": func() []byte { return v.bytes(0, size) },
		"plain":  func() []byte { return p.bytes(0, size) },
	} {
		for _, connections := range []string{"1", "4"} {
			run(t, "nbdcopy", "--flush", "--connections="+connections, source, uri(addr, name))
			if !bytes.Equal(got(), data) {
				t.Errorf("%s, %s connections: wrong data at the server", name, connections)
			}
			back := filepath.Join(t.TempDir(), "back")
			run(t, "nbdcopy", "--connections="+connections, uri(addr, name), back)
			if b, err := os.ReadFile(back); err != nil || !bytes.Equal(b, data) {
				t.Errorf("%s, %s connections: wrong data at the client, error %v", name, connections, err)
			}
		}
	}
	if v.syncs.Load() == 0 || p.syncs.Load() == 0 {
		t.Error("a flush did not reach its backend")
	}
}

func TestQemuIO(t *testing.T) {
	testenv.Program(t, "qemu-io")
	a := newAble(testSize)
	s := startServer(t, ServerOptions{}, Export{Name: "a", Backend: a})
	addr, _ := serve(t, s)
	run(t, "qemu-io", "-f", "raw", "-c", "write -f -P 0x5a 4096 65536", "-c", "read -P 0x5a 4096 65536",
		"-c", "write -z 8192 4096", "-c", "read -P 0 8192 4096", "-c", "discard 0 4096", "-c", "flush",
		"nbd+unix:///a?socket="+addr)
	if got := a.bytes(4096, 8192); !bytes.Equal(got, append(bytes.Repeat([]byte{0x5a}, 4096), make([]byte, 4096)...)) {
		t.Error("wrong data at the server")
	}
	if a.syncs.Load() == 0 || a.trimmed.Load() != 4096 {
		t.Errorf("%d syncs, %d bytes trimmed", a.syncs.Load(), a.trimmed.Load())
	}
}

// TestRecordTranscripts writes what real clients send to testdata, the seeds of
// the fuzz tests. It runs where MEMFERRY_RECORD is set.
func TestRecordTranscripts(t *testing.T) {
	if os.Getenv("MEMFERRY_RECORD") == "" {
		t.Skip("records only with MEMFERRY_RECORD=1")
	}
	source := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(source, newPattern(fuzzSize).data, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, command := range map[string][]string{
		"nbdinfo":       {"nbdinfo", "--json", "URI"},
		"nbdinfo-list":  {"nbdinfo", "--list", "URI"},
		"nbdinfo-map":   {"nbdinfo", "--map", "URI"},
		"nbdcopy-read":  {"nbdcopy", "--connections=1", "--request-size=8192", "URI", "null:"},
		"nbdcopy-write": {"nbdcopy", "--connections=1", "--request-size=8192", "--flush", source, "URI"},
		"qemu-io": {
			"qemu-io", "-f", "raw", "-c", "write -f 0 512", "-c", "read 0 4096",
			"-c", "write -z 8192 4096", "-c", "discard 0 4096", "-c", "flush", "URI",
		},
	} {
		s := fuzzServer(t)
		r := &recording{Listener: mustListen(t)}
		done := make(chan error, 1)
		go func() { done <- s.Serve(context.Background(), r) }()
		for i := range command {
			command[i] = strings.ReplaceAll(command[i], "URI", uri(r.Addr().String(), "able"))
		}
		run(t, command[0], command[1:]...)
		if err := s.Shutdown(testenv.Deadline(t, hang)); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		for i, b := range r.all {
			if err := os.WriteFile(fmt.Sprintf("testdata/client-%s-%d.bin", name, i), b.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// recording is a listener that keeps what each client sends.
type recording struct {
	net.Listener
	mu  sync.Mutex
	all []*bytes.Buffer
}

func (r *recording) Accept() (net.Conn, error) {
	nc, err := r.Listener.Accept()
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	b := &bytes.Buffer{}
	r.all = append(r.all, b)
	return halfClosed{nc, io.TeeReader(nc, b)}, nil
}
