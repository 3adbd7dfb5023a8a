package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/internal/testenv"
)

// mounted is a running "memferry mount".
type mounted struct {
	*process
	path string
}

// mount starts "memferry mount" in the foreground and waits until the file is
// there.
func mount(t testing.TB, uri, path string, flags ...string) *mounted {
	t.Helper()
	testenv.FUSE(t)
	m := &mounted{start(t, memferry, append(append([]string{"mount"}, flags...), uri, path)...), path}
	t.Cleanup(func() {
		// The process has ended or ends now; nothing may stay mounted.
		if m.stop(); isFUSE(path) {
			t.Errorf("%s is still mounted", path)
			_ = unix.Unmount(path, unix.MNT_DETACH)
		}
	})
	m.eventually("memferry mount", func() error {
		if !isFUSE(path) {
			return fmt.Errorf("%s is not mounted", path)
		}
		if !strings.Contains(m.out.String(), "mounted ") {
			return fmt.Errorf("it does not say that %s is mounted", path)
		}
		return nil
	})
	return m
}

// umount unmounts as a person would, and waits for the process.
func (m *mounted) umount() {
	m.t.Helper()
	run(m.t, memferry, "umount", m.path)
	select {
	case <-m.done:
		if m.err != nil {
			m.t.Errorf("memferry mount ended with %v after umount\n%s", m.err, m.out.String())
		}
	case <-time.After(time.Minute):
		m.t.Errorf("memferry mount did not end within a minute of umount")
	}
	if isFUSE(m.path) {
		m.t.Errorf("%s is still mounted", m.path)
	}
}

// link puts a link between a server's socket and its clients, and returns the
// socket on the far side.
func link(t testing.TB, target string, l netsim.Link) (*netsim.Proxy, string) {
	t.Helper()
	socket := testenv.TempSocket(t)
	p, err := netsim.Listen(t.Context(), netsim.UNIX(socket), netsim.UNIX(target), l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close the link: %v", err)
		}
	})
	return p, socket
}

// slow is the link of the mount tests: 50 ms away, and narrow enough that the
// background pull is still running while an application works.
var slow = netsim.Link{RTT: 50 * time.Millisecond, Bandwidth: 48 << 20}

// mountFar serves a file and mounts it from the far side of a slow link, on a
// file of the same name in an ordinary directory.
func mountFar(t testing.TB, disk, name string, flags ...string) *mounted {
	t.Helper()
	s := serve(t, "disk="+disk)
	_, socket := link(t, s.socket, slow)
	return mount(t, unixURI(socket, "disk"), filepath.Join(t.TempDir(), name), flags...)
}

// TestMountEveryByte: cmp, while the pull runs.
func TestMountEveryByte(t *testing.T) {
	content := pattern(20, 48*mib+4096)
	disk := file(t, "disk", content)
	for _, flags := range [][]string{
		nil,
		{"--direct"},
		{"--pull=demand"},
		{"--pull=none", "--chunk=1M"},
		{"--read-only"},
		{"--cache=" + filepath.Join(t.TempDir(), "cache")},
	} {
		t.Run(strings.Join(flags, " "), func(t *testing.T) {
			m := mountFar(t, disk, "disk", flags...)
			same(t, m.path, disk)
			m.umount()
			holds(t, disk, content)
		})
	}
}

// TestMountOnDirectory: the file stands in it, named after the export.
func TestMountOnDirectory(t *testing.T) {
	disk := file(t, "x", pattern(21, mib))
	s := serve(t, "disk="+disk)
	dir := t.TempDir()
	m := mount(t, s.uri("disk"), dir)
	same(t, filepath.Join(dir, "disk"), disk)
	m.umount()
}

// TestMountDaemon: the command returns once the file is usable, and umount
// brings the writes home.
func TestMountDaemon(t *testing.T) {
	testenv.FUSE(t)
	disk := file(t, "disk", pattern(22, 8*mib))
	s := serve(t, "disk="+disk)
	path := filepath.Join(t.TempDir(), "disk")
	t.Cleanup(func() {
		if isFUSE(path) {
			_, _ = try(t, memferry, "umount", path)
		}
	})
	run(t, memferry, "mount", "--daemon", s.uri("disk"), path)
	same(t, path, disk)
	patch(t, path, mib+100, []byte("written through the mount"))
	var status any
	if out := output(t, memferry, "status", "--json", path); json.Unmarshal(out, &status) != nil {
		t.Errorf("status --json is not JSON:\n%s", out)
	}
	run(t, memferry, "umount", path)
	if isFUSE(path) {
		t.Fatal("still mounted")
	}
	got, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(got[mib:mib+200], []byte("written through the mount")) {
		t.Error("the write has not reached the source")
	}
}

// patch writes some bytes of a file that exists, and syncs them.
func patch(t testing.TB, path string, off int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// TestMountFio: fio's verifying engines on a mount whose pull is running, and
// what they wrote is what the source has in the end.
func TestMountFio(t *testing.T) {
	need(t, "fio")
	for _, engine := range []string{"mmap", "psync", "libaio"} {
		t.Run(engine, func(t *testing.T) {
			disk := file(t, "disk", pattern(23, 96*mib))
			m := mountFar(t, disk, "disk")
			args := []string{
				"--name=verify", "--ioengine=" + engine, "--filename=" + m.path, "--rw=randrw", "--bsrange=4k-128k",
				"--blockalign=4k", "--size=96M", "--io_size=48M", "--iodepth=16", "--fsync=64", "--verify=crc32c", "--do_verify=1",
				"--verify_fatal=1", "--verify_state_save=0", "--allow_file_create=0", "--overwrite=1",
			}
			if engine == "libaio" {
				args = append(args, "--direct=1")
			}
			run(t, "fio", args...)
			snapshot := filepath.Join(t.TempDir(), "snapshot")
			copyFile(t, m.path, snapshot)
			m.umount()
			same(t, disk, snapshot)
		})
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Error(err)
	}
	if err := out.Close(); err != nil {
		t.Error(err)
	}
}

// TestMountSQLite: a database on the mounted file, its journal or WAL beside it
// in the directory that holds the mountpoint.
//
// The file can't grow, so the database gets its free pages beforehand: a large
// row is inserted and deleted again, and SQLite reuses those pages.
func TestMountSQLite(t *testing.T) {
	need(t, "sqlite3")
	for _, journal := range []string{"DELETE", "WAL", "MEMORY"} {
		t.Run(journal, func(t *testing.T) {
			disk := filepath.Join(t.TempDir(), "disk")
			run(t, "sqlite3", disk,
				"PRAGMA page_size=4096; CREATE TABLE t(id INTEGER PRIMARY KEY, k TEXT, v BLOB);"+
					"CREATE INDEX i ON t(k); INSERT INTO t SELECT value, 'old'||value, randomblob(200) FROM generate_series(1, 5000);"+
					"CREATE TABLE room(v); INSERT INTO room VALUES(zeroblob(24*1024*1024)); DROP TABLE room;")
			m := mountFar(t, disk, "live.db")
			out := run(t, "sqlite3", m.path,
				"PRAGMA journal_mode="+journal+";",
				"BEGIN; INSERT INTO t SELECT value, 'new'||value, randomblob(500) FROM generate_series(10001, 20000); COMMIT;",
				"BEGIN; DELETE FROM t; ROLLBACK;",
				"UPDATE t SET v=randomblob(100) WHERE id % 3 = 0;",
				"DELETE FROM t WHERE id % 7 = 0;",
				"SELECT 'rows', count(*), count(DISTINCT k) FROM t;",
				"PRAGMA wal_checkpoint(TRUNCATE);",
				"PRAGMA integrity_check;")
			if !strings.Contains(out, "ok") || !strings.Contains(out, "rows|") {
				t.Errorf("sqlite3 on the mount:\n%s", out)
			}
			want := run(t, "sqlite3", m.path, "SELECT count(*), sum(length(v)), max(k) FROM t;")
			m.umount()
			got := run(t, "sqlite3", disk, "SELECT count(*), sum(length(v)), max(k) FROM t; PRAGMA integrity_check;")
			if got != want+"ok\n" {
				t.Errorf("the source says %q, the mount said %q", got, want)
			}
		})
	}
}

// TestMountVideo: an MP4 whose index stands at its end, which players jump to
// first.
func TestMountVideo(t *testing.T) {
	need(t, "ffmpeg", "ffprobe")
	dir := t.TempDir()
	movie := filepath.Join(dir, "movie.mp4")
	run(t, "ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=duration=12:size=1280x720:rate=25",
		"-f", "lavfi", "-i", "sine=duration=12", "-c:v", "mpeg4", "-q:v", "1", "-c:a", "aac", movie)
	checkIndexAtEnd(t, movie)

	m := mountFar(t, movie, "movie.mp4", "--read-only")
	probe := []string{"-v", "error", "-show_entries", "format=duration,size:stream=codec_name,nb_frames", "-of", "json"}
	if got, want := run(t, "ffprobe", append(probe, m.path)...), run(t, "ffprobe", append(probe, movie)...); got != want {
		t.Errorf("ffprobe on the mount: %s\non the source: %s", got, want)
	}
	decode := func(path string) string {
		return run(t, "ffmpeg", "-v", "error", "-ss", "9", "-i", path, "-t", "2", "-map", "0:v", "-f", "md5", "-")
	}
	if got, want := decode(m.path), decode(movie); got != want {
		t.Errorf("ffmpeg decodes %s from the mount, %s from the source", got, want)
	}
	m.umount()
}

// checkIndexAtEnd makes sure that the movie is what the test is about.
func checkIndexAtEnd(t testing.TB, movie string) {
	t.Helper()
	b, err := os.ReadFile(movie)
	if err != nil {
		t.Fatal(err)
	}
	if moov := bytes.LastIndex(b, []byte("moov")); moov < len(b)*9/10 || len(b) < int(4*mib) {
		t.Fatalf("the index of the %d bytes long movie is at %d", len(b), moov)
	}
}

// TestMountExecute: a program straight from a mount.
func TestMountExecute(t *testing.T) {
	want := run(t, memferry, "version")
	program := filepath.Join(t.TempDir(), "program")
	copyFile(t, memferry, program) // the one that runs can't be opened for writing
	m := mountFar(t, program, "program", "--read-only")
	out, err := exec.CommandContext(testenv.Deadline(t, hang), m.path, "version").CombinedOutput()
	if err != nil || string(out) != want {
		t.Errorf("from the mount: %q, %v; from the disk: %q", out, err, want)
	}
	m.umount()
}

// TestMountHoles: what is sparse at the source is sparse here, and a hole
// punched here is one there.
func TestMountHoles(t *testing.T) {
	const size = 64 * mib
	disk := sparse(t, size, map[int64][]byte{8 * mib: pattern(24, 4*mib)})
	s := serve(t, "disk="+disk)
	m := mount(t, s.uri("disk"), filepath.Join(t.TempDir(), "disk"))
	f, err := os.OpenFile(m.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if off, err := f.Seek(0, unix.SEEK_DATA); err != nil || off > 8*mib {
		t.Errorf("SEEK_DATA finds %d, %v", off, err)
	}
	if off, err := f.Seek(8*mib, unix.SEEK_HOLE); err != nil || off < 12*mib {
		t.Errorf("SEEK_HOLE finds %d, %v", off, err)
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 9*mib, 2*mib)
	if err != nil {
		t.Errorf("punch: %v", err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	before := allocated(t, disk)
	f.Close()
	m.umount()
	want := make([]byte, size)
	copy(want[8*mib:], pattern(24, 4*mib))
	clear(want[9*mib : 11*mib])
	holds(t, disk, want)
	if after := allocated(t, disk); after > before {
		t.Errorf("%d bytes allocated at the source before the push of a hole, %d after", before, after)
	}
}

// TestMountCacheResumes: the next mount starts with what this one had.
func TestMountCacheResumes(t *testing.T) {
	content := pattern(25, 16*mib)
	disk := file(t, "disk", content)
	cache := filepath.Join(t.TempDir(), "cache")
	s := serve(t, "disk="+disk)
	proxy, socket := link(t, s.socket, netsim.Link{})
	path := filepath.Join(t.TempDir(), "disk")

	m := mount(t, unixURI(socket, "disk"), path, "--cache", cache)
	same(t, path, disk)
	m.umount()

	_, before := proxy.Bytes()
	m = mount(t, unixURI(socket, "disk"), path, "--cache", cache)
	holds(t, path, content)
	m.umount()
	if _, after := proxy.Bytes(); after-before > mib {
		t.Errorf("the second mount fetched %d bytes of 16 MiB that were there", after-before)
	}
}
