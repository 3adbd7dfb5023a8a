package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/internal/testenv"
)

// The outage tests have a mount read and written all the time by a load that
// checks every byte it reads, take the network away, and give it back.
const (
	outageSize    = 48 << 20
	outageBlock   = 64 << 10
	outageWriters = 2

	// outageTimeout is --io-timeout. A connection that only looks alive is given
	// up after half of it.
	outageTimeout = 20 * time.Second
)

// outage is a way to lose the network, and to get it back.
type outage struct {
	begin, end func(t *testing.T, n *network)
}

// network is a server behind a link.
type network struct {
	server *server
	link   *netsim.Proxy
	disk   string
	uri    string
	args   []string // of the server
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{disk: file(t, "disk", pattern(7, outageSize))}
	n.args = []string{"disk=" + n.disk}
	n.server = serve(t, n.args...)
	var socket string
	n.link, socket = link(t, n.server.socket, netsim.Link{RTT: 5 * time.Millisecond, Bandwidth: 32 << 20})
	n.uri = unixURI(socket, "disk")
	return n
}

var outages = map[string]outage{
	// All connections are reset, and new ones refused.
	"reset": {
		func(t *testing.T, n *network) { must(t, n.link.Refuse(true)); n.link.Reset() },
		func(t *testing.T, n *network) { must(t, n.link.Refuse(false)) },
	},
	// Nothing passes and nobody is told.
	"black hole": {
		func(_ *testing.T, n *network) { n.link.Blackhole(true) },
		func(_ *testing.T, n *network) { n.link.Blackhole(false) },
	},
	// The server's end is gone and does not say so.
	"half open": {
		func(t *testing.T, n *network) { must(t, n.link.Refuse(true)); n.link.HalfOpen(netsim.Server) },
		func(t *testing.T, n *network) { must(t, n.link.Refuse(false)) },
	},
	// The server is gone, its machine answers.
	"server killed": {
		func(_ *testing.T, n *network) { n.server.kill() },
		func(t *testing.T, n *network) { n.server = serveAt(t, n.server.socket, n.args...) },
	},
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestOutage takes the network away for ten seconds, less than --io-timeout: no
// application sees an error, and no byte is lost.
func TestOutage(t *testing.T) {
	testenv.FUSE(t)
	length := 10 * time.Second
	if testing.Short() {
		length = 3 * time.Second
	}
	for name, o := range outages {
		for kind, flags := range map[string][]string{
			"managed":         nil,
			"managed, remote": {"--durability=remote"},
			"direct":          {"--direct"},
		} {
			if name == "server killed" && kind == "direct" {
				continue // TestOutageDirectRestart
			}
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				n := newNetwork(t)
				m := mount(t, n.uri, filepath.Join(t.TempDir(), "disk"), append(flags, "--io-timeout="+outageTimeout.String())...)
				l := startLoad(t, m.path)
				time.Sleep(time.Second)
				o.begin(t, n)
				time.Sleep(length)
				o.end(t, n)
				l.goesOn(outageTimeout/2 + 5*time.Second)
				l.stop()
				m.umount()
				if err := l.compare(n.disk); err != nil {
					t.Errorf("the source after umount: %v", err)
				}
			})
		}
	}
}

// TestOutageTooLong takes the network away for longer than --io-timeout. What
// needs the network gets EIO by then; once it is back, so is the mount.
func TestOutageTooLong(t *testing.T) {
	testenv.FUSE(t)
	const timeout = 3 * time.Second
	for name, o := range outages {
		for kind, flags := range map[string][]string{
			// Nothing is pulled ahead, so that reads need the network.
			"managed": {"--pull=none", "--durability=remote"},
			"direct":  {"--direct"},
		} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				n := newNetwork(t)
				m := mount(t, n.uri, filepath.Join(t.TempDir(), "disk"), append(flags, "--io-timeout="+timeout.String())...)
				o.begin(t, n)
				begin := time.Now()
				read := readBlock(m.path, outageSize/2)
				took := time.Since(begin)
				if !errors.Is(read, unix.EIO) {
					t.Errorf("a read during the outage: %v, want EIO", read)
				}
				if took > timeout+5*time.Second {
					t.Errorf("the error came after %v; --io-timeout is %v", took, timeout)
				}
				if err := writeAndSync(m.path); !errors.Is(err, unix.EIO) {
					t.Errorf("fsync during the outage: %v, want EIO", err)
				}
				o.end(t, n)
				m.eventually("the mount, once the link is back,", func() error {
					return errors.Join(readBlock(m.path, outageSize/2), writeAndSync(m.path))
				})
				m.umount()
				want := pattern(7, outageSize)
				copy(want, synced)
				holds(t, n.disk, want)
			})
		}
	}
}

// TestOutageDirectRestart kills the server of a direct mount. Nobody knows then
// whether what it had acknowledged reached its disk: fsync says so, once.
func TestOutageDirectRestart(t *testing.T) {
	testenv.FUSE(t)
	t.Parallel()
	n := newNetwork(t)
	m := mount(t, n.uri, filepath.Join(t.TempDir(), "disk"), "--direct", "--io-timeout=30s")
	f, err := os.OpenFile(m.path, os.O_RDWR|unix.O_DIRECT, 0)
	must(t, err)
	defer f.Close()
	block := alignedBlock(t)
	_, err = f.WriteAt(block, 0)
	must(t, err)
	o := outages["server killed"]
	o.begin(t, n)
	o.end(t, n)
	if err := f.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("fsync after the server was killed: %v, want EIO", err)
	}
	_, err = f.WriteAt(block, 0)
	must(t, err)
	if err := f.Sync(); err != nil {
		t.Errorf("fsync after writing again: %v", err)
	}
	must(t, f.Close())
	m.umount()
}

// alignedBlock is memory fit for O_DIRECT.
func alignedBlock(t testing.TB) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	must(t, err)
	t.Cleanup(func() { _ = unix.Munmap(p) })
	for i := range p {
		p[i] = 0x5a
	}
	return p
}

func readBlock(path string, off int64) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(p) }()
	if _, err := f.ReadAt(p, off); err != nil {
		return err
	}
	if want := pattern(7, outageSize)[off : off+4096]; !bytes.Equal(p, want) {
		return fmt.Errorf("wrong bytes at %d", off)
	}
	return nil
}

// synced is what writeAndSync writes at the start.
var synced = bytes.Repeat([]byte("written "), 512)

func writeAndSync(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(synced, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// load is an application that reads and writes all the time. Each writer has a
// part of the file of its own, and knows what it must find there.
type load struct {
	t       *testing.T
	quit    chan struct{}
	wg      sync.WaitGroup
	steps   atomic.Int64 // that needed the network, or may have
	content []byte       // of the file, as it must be; writers own their parts
}

func startLoad(t *testing.T, path string) *load {
	l := &load{t: t, quit: make(chan struct{}), content: pattern(7, outageSize)}
	t.Cleanup(func() { l.stop() })
	const part = outageSize / outageWriters
	for w := range outageWriters {
		rng := testenv.Rand(t)
		l.wg.Go(func() {
			if err := l.write(path, int64(w)*part, part, rng); err != nil {
				t.Errorf("writer %d: %v", w, err)
			}
		})
	}
	return l
}

// write writes, reads back, and syncs.
func (l *load) write(path string, from, size int64, rng *rand.Rand) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, outageBlock)
	for i := uint64(1); ; i++ {
		select {
		case <-l.quit:
			return f.Close()
		default:
		}
		off := from + rng.Int64N(size/outageBlock)*outageBlock
		want := l.content[off : off+outageBlock]
		if _, err := f.ReadAt(p, off); err != nil {
			return err
		}
		if d := firstDifference(p, want); d >= 0 {
			return fmt.Errorf("wrong byte at %d", off+int64(d))
		}
		for j := 0; j < outageBlock; j += 8 {
			binary.LittleEndian.PutUint64(want[j:], i<<32|uint64(j))
		}
		if _, err := f.WriteAt(want, off); err != nil {
			return err
		}
		if i%8 == 0 {
			if err := f.Sync(); err != nil {
				return fmt.Errorf("fsync: %w", err)
			}
		}
		l.steps.Add(1)
	}
}

// goesOn waits until the load has got on, for at most d.
func (l *load) goesOn(d time.Duration) {
	l.t.Helper()
	want := l.steps.Load() + 20*outageWriters
	for deadline := time.Now().Add(d); l.steps.Load() < want; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Errorf("%v after the link was back, the load has made %d steps of %d", d, l.steps.Load(), want)
			return
		}
		if l.t.Failed() {
			return
		}
	}
}

func (l *load) stop() {
	select {
	case <-l.quit:
	default:
		close(l.quit)
	}
	l.wg.Wait()
}

// compare compares a file with what the load has left.
func (l *load) compare(path string) error {
	got, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if d := firstDifference(got, l.content); d >= 0 || len(got) != len(l.content) {
		return fmt.Errorf("%s of %d bytes differs at %d", path, len(got), d)
	}
	return nil
}
