package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/netsim"
)

// memoryLimit is what serve and mount may keep beside the local backend.
const memoryLimit = 64 << 20

// peak samples a process's own memory until stop is called.
func peak(t testing.TB, p *process) (stop func() int64) {
	t.Helper()
	var most int64
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			most = max(most, ownMemory(p.pid()))
			select {
			case <-done:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	return func() int64 {
		close(done)
		wg.Wait()
		return most
	}
}

// ownMemory is the resident memory less what is shared: the memfd of a volatile
// local side, which is RssShmem. A cache is not mapped, so RssFile, the program
// itself, counts in full.
func ownMemory(pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	return statusField(status, "RssAnon") + statusField(status, "RssFile")
}

func TestServeMemory(t *testing.T) {
	need(t, "nbdcopy", "fio")
	disk := file(t, "disk", pattern(40, 256*mib))
	s := serve(t, "disk="+disk)
	stop := peak(t, s.process)
	for range 2 {
		run(t, "nbdcopy", "--connections=8", "--requests=64", "--request-size=1048576", s.uri("disk"), "null:")
	}
	run(t, "fio", "--name=load", "--ioengine=nbd", "--uri="+s.uri("disk"), "--rw=randrw", "--bs=256k",
		"--size=256M", "--io_size=256M", "--iodepth=128")
	if most := stop(); most > memoryLimit {
		t.Errorf("serve took up to %d MiB, the limit is %d", most>>20, memoryLimit>>20)
	} else {
		t.Logf("serve took up to %d MiB", most>>20)
	}
}

// mountLoads are what takes most: long requests, many small writes, and both
// while the remote is away far enough that all buffers fill.
var mountLoads = []struct {
	name string
	far  bool
	fio  []string
}{
	{"near", false, []string{"--direct=1", "--rw=randrw", "--bs=256k", "--iodepth=64"}},
	{"long", true, []string{"--direct=1", "--rw=randrw", "--bs=1M", "--iodepth=32", "--numjobs=2"}},
	{"many", true, []string{"--direct=1", "--rw=randrw", "--bs=1M", "--iodepth=128", "--numjobs=4", "--io_size=64M"}},
	{"small", true, []string{"--direct=1", "--rw=randrw", "--bs=4k", "--iodepth=128", "--fsync=2048", "--io_size=32M"}},
	{"buffered", true, []string{"--rw=randrw", "--bs=64k", "--iodepth=1", "--numjobs=4", "--end_fsync=1"}},
}

func TestMountMemory(t *testing.T) {
	need(t, "fio")
	disk := file(t, "disk", pattern(41, 256*mib))
	s := serve(t, "disk="+disk)
	for _, side := range []string{"memory", "direct", "cache", "plain"} {
		for _, load := range mountLoads {
			t.Run(side+" "+load.name, func(t *testing.T) {
				cache := "--cache=" + filepath.Join(t.TempDir(), "cache")
				flags := map[string][]string{"direct": {"--direct"}, "cache": {cache}, "plain": {cache}}[side]
				socket := s.socket
				if load.far {
					_, socket = link(t, s.socket, netsim.Link{RTT: 4 * time.Millisecond})
				}
				uri := unixURI(socket, "disk")
				if side == "plain" { // a remote that can't stream: pulls are copied as well
					uri = disk
				}
				m := mount(t, uri, filepath.Join(t.TempDir(), "disk"), flags...)
				stop := peak(t, m.process)
				run(t, "fio", append([]string{
					"--name=load", "--filename=" + m.path, "--ioengine=libaio", "--size=256M", "--io_size=128M", "--group_reporting",
				}, load.fio...)...)
				same(t, m.path, m.path)
				if most := stop(); most > memoryLimit {
					t.Errorf("mount took up to %d MiB, the limit is %d", most>>20, memoryLimit>>20)
				} else {
					t.Logf("mount took up to %d MiB", most>>20)
				}
				m.umount()
			})
		}
	}
}

// TestMountTebibyte: a sparse region's cost does not grow with its size.
func TestMountTebibyte(t *testing.T) {
	const limit = 100 << 20
	s := serve(t, "huge=mem:?size=1T")
	begin := time.Now()
	m := mount(t, s.uri("huge"), filepath.Join(t.TempDir(), "huge"))
	ready := time.Since(begin)
	stop := peak(t, m.process)
	f, err := os.OpenFile(m.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range int64(64) {
		off := i * (16 << 30)
		if _, err := f.WriteAt([]byte("here"), off); err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(make([]byte, 8192), off+8<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second) // let the pull show what it would take
	if most := stop(); most > limit {
		t.Errorf("a mount of 1 TiB took up to %d MiB, the limit is %d", most>>20, limit>>20)
	} else {
		t.Logf("ready after %v, up to %d MiB", ready, most>>20)
	}
	f.Close()
	m.umount()
}
