package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
)

// TestUmountWithoutNetwork unmounts while the server can't be reached: within
// --io-timeout it says what was not pushed and where that is, and the next
// mount pushes it.
func TestUmountWithoutNetwork(t *testing.T) {
	testenv.FUSE(t)
	t.Parallel()
	n := newNetwork(t)
	dir := t.TempDir()
	path, cache := filepath.Join(dir, "disk"), filepath.Join(dir, "cache")
	flags := []string{"--cache=" + cache, "--io-timeout=2s", "--push-interval=1h", "--push-idle=1h"}
	m := mount(t, n.uri, path, flags...)
	must(t, writeAndSync(path))
	outages["black hole"].begin(t, n)
	begin := time.Now()
	out, err := try(t, memferry, "umount", path)
	if code := exitCode(err); code != 1 {
		t.Errorf("umount without network: status %d, want 1\n%s", code, out)
	}
	if took := time.Since(begin); took > 15*time.Second {
		t.Errorf("umount took %v", took)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n") // the progress before the last one
	if last := lines[len(lines)-1]; !strings.Contains(last, "4 KiB") || !strings.Contains(last, cache) || !strings.Contains(last, "; mount again") {
		t.Errorf("umount does not say in one line what was not pushed, where it is, and what to do:\n%s", out)
	}
	<-m.done
	outages["black hole"].end(t, n)

	mount(t, n.uri, path, flags...).umount()
	want := pattern(7, outageSize)
	copy(want, synced)
	holds(t, n.disk, want)
}

// TestSecondSignal interrupts a mount that can't push what it holds, and again.
func TestSecondSignal(t *testing.T) {
	testenv.FUSE(t)
	t.Parallel()
	n := newNetwork(t)
	dir := t.TempDir()
	path, cache := filepath.Join(dir, "disk"), filepath.Join(dir, "cache")
	m := mount(t, n.uri, path, "--cache="+cache, "--io-timeout=10m", "--push-interval=1h", "--push-idle=1h")
	must(t, writeAndSync(path))
	outages["black hole"].begin(t, n)
	m.signal(syscall.SIGINT)
	select {
	case <-m.done:
		t.Fatalf("it ended without having pushed: %v\n%s", m.err, m.out.String())
	case <-time.After(time.Second):
	}
	m.signal(syscall.SIGINT)
	select {
	case <-m.done:
	case <-time.After(20 * time.Second):
		t.Fatalf("the second signal does not end it\n%s", m.out.String())
	}
	if m.err == nil {
		t.Error("status 0 though something was not pushed")
	}
	if out := m.out.String(); !strings.Contains(out, "4 KiB of writes did not reach") || !strings.Contains(out, cache) {
		t.Errorf("it does not say what was not pushed, and where it is:\n%s", out)
	}
	if isFUSE(path) {
		t.Error("still mounted")
	}
	outages["black hole"].end(t, n)

	mount(t, n.uri, path, "--cache="+cache).umount()
	want := pattern(7, outageSize)
	copy(want, synced)
	holds(t, n.disk, want)
}

// TestRemoteShrinks cuts the source off under live mounts.
func TestRemoteShrinks(t *testing.T) {
	testenv.FUSE(t)
	for kind, flags := range map[string][]string{"managed": {"--pull=none"}, "direct": {"--direct"}} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			n := newNetwork(t)
			path := filepath.Join(t.TempDir(), "disk")
			m := mount(t, n.uri, path, append(flags, "--io-timeout=3s")...)
			must(t, readBlock(path, 0))
			must(t, os.Truncate(n.disk, outageSize/2))
			if err := readBlock(path, outageSize-4096); err == nil {
				t.Error("a read of what the source has no longer succeeds")
			}
			must(t, readBlock(path, 4096))
			// The server is started again, and now tells the new size.
			n.server.kill()
			n.server = serveAt(t, n.server.socket, n.args...)
			m.eventually("an error that tells the sizes", func() error {
				_ = readBlock(path, 8192)
				if !strings.Contains(m.out.String(), "size was") {
					return os.ErrNotExist
				}
				return nil
			})
			begin := time.Now()
			_, _ = try(t, memferry, "umount", path) // what it has to say is tested elsewhere
			if took := time.Since(begin); took > 20*time.Second {
				t.Errorf("umount took %v", took)
			}
			<-m.done
			if strings.Contains(m.out.String(), "goroutine ") {
				t.Errorf("a stack trace:\n%s", m.out.String())
			}
		})
	}
}
