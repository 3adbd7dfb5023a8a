package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/internal/testenv"
)

// TestCrash kills "memferry mount" at random instants, again and again over the
// same cache, and checks every byte that the next mount shows: what fsync
// acknowledged is there, and each page is one that the source or the
// application once made, never a mixture, never older than promised.
func TestCrash(t *testing.T) {
	testenv.FUSE(t)
	rounds := 100
	if testing.Short() {
		rounds = 10
	}
	for _, durability := range []string{"local", "remote"} {
		t.Run("durability="+durability, func(t *testing.T) {
			n := rounds
			if durability == "remote" {
				n = max(rounds/5, 5)
			}
			newCrasher(t, durability).run(n)
		})
	}
}

const crashPages = 1536 // 6 MiB

// crasher is the test's model: a page holds its own number and a version,
// repeated; version 0 is what the source had from the start.
type crasher struct {
	t          *testing.T
	rng        *rand.Rand
	durability string
	disk       string // the source
	path       string // the mountpoint
	args       []string

	written [crashPages]uint64 // the last version handed to write
	session [crashPages]uint64 // the last version handed to write since the mount; 0 for none
	durable [crashPages]uint64 // the last version that fsync acknowledged
	version uint64
	synced  int // fsyncs acknowledged
}

func newCrasher(t *testing.T, durability string) *crasher {
	c := &crasher{t: t, rng: testenv.Rand(t), durability: durability}
	c.disk = file(t, "disk", nil)
	var content bytes.Buffer
	for p := range crashPages {
		content.Write(page(p, 0))
	}
	if err := os.WriteFile(c.disk, content.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	s := serve(t, "disk="+c.disk)
	// Slow enough for the pull to be under way when most kills come.
	_, socket := link(t, s.socket, netsim.Link{RTT: 4 * time.Millisecond, Bandwidth: 24 << 20})
	dir := t.TempDir()
	c.path = filepath.Join(dir, "disk")
	c.args = []string{
		"mount", "--cache", filepath.Join(dir, "cache"), "--durability", durability,
		"--push-interval", "30ms", "--chunk", "64K", unixURI(socket, "disk"), c.path,
	}
	t.Cleanup(func() {
		// After a failure; a stale mount can't even be asked what it is.
		_ = unix.Unmount(c.path, unix.MNT_DETACH)
	})
	return c
}

// page returns one page's bytes for a version.
func page(number int, version uint64) []byte {
	p := make([]byte, 4096)
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], uint64(number)<<16|0x4d46)
		binary.LittleEndian.PutUint64(p[i+8:], version)
	}
	return p
}

func (c *crasher) run(rounds int) {
	for i := range rounds {
		c.round(i)
		if c.t.Failed() {
			c.t.Fatalf("in round %d of %d", i, rounds)
		}
	}
	// Once more, to the end: what the mount shows is what the source gets.
	p := start(c.t, memferry, c.args...)
	c.await(p, func() bool { return false })
	seen := c.check("the last mount", c.path)
	if out, err := try(c.t, memferry, "umount", c.path); err != nil {
		c.t.Fatalf("umount: %v\n%s", err, out)
	}
	<-p.done
	final := c.check("the source after umount", c.disk)
	for n := range seen {
		if seen[n] != final[n] {
			c.t.Errorf("page %d: the mount showed version %d, the source has %d", n, seen[n], final[n])
		}
	}
	c.t.Logf("%d kills, %d versions written, %d fsyncs acknowledged", rounds, c.version, c.synced)
	if c.synced < rounds/4 {
		c.t.Errorf("only %d fsyncs were acknowledged in %d rounds: the test tests little", c.synced, rounds)
	}
}

// round mounts, checks what survived the last kill, writes, and kills.
func (c *crasher) round(i int) {
	p := start(c.t, memferry, c.args...)
	var killed atomic.Bool
	kill := func() {
		killed.Store(true)
		p.kill()
	}
	delay := time.Duration(c.rng.Int64N(int64(500 * time.Millisecond)))
	if i%10 == 9 { // in the middle of mounting
		delay = time.Duration(c.rng.Int64N(int64(40 * time.Millisecond)))
		ended := make(chan struct{})
		timer := time.AfterFunc(delay, func() { kill(); close(ended) })
		select {
		case <-p.done:
		case <-ended:
		}
		timer.Stop()
		if !killed.Load() {
			c.t.Errorf("memferry mount ended by itself: %v\n%s", p.err, p.out.String())
		}
		return
	}
	c.await(p, killed.Load)
	c.check(fmt.Sprintf("round %d", i), c.path) // before the pull is complete
	ended := make(chan struct{})
	timer := time.AfterFunc(delay, func() { kill(); close(ended) })
	defer timer.Stop()
	err := c.write()
	if !killed.Load() {
		c.t.Errorf("writing failed before the kill: %v\n%s", err, p.out.String())
		kill()
		return
	}
	<-ended
	if c.durability == "remote" {
		c.awaitServer()
		c.check("the source", c.disk)
	}
}

// await waits until the mount is usable.
func (c *crasher) await(p *process, ended func() bool) {
	c.t.Helper()
	p.eventually("memferry mount", func() error {
		if ended() {
			return nil
		}
		info, err := os.Stat(c.path) // fails on a stale mount, until it is cleared
		if err != nil {
			return err
		}
		if !isFUSE(c.path) || info.Size() != crashPages*4096 {
			return errors.New("not mounted")
		}
		return nil
	})
}

// awaitServer waits until the server has ended the write that it may be in the
// middle of: a page that is read then can be half of it.
func (c *crasher) awaitServer() {
	c.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		content, err := os.ReadFile(c.disk)
		if err != nil {
			c.t.Fatal(err)
		}
		torn := false
		for n := range min(crashPages, len(content)/4096) {
			got := content[n*4096:][:4096]
			torn = torn || !bytes.Equal(got, page(n, binary.LittleEndian.Uint64(got[8:])))
		}
		if !torn {
			return
		}
	}
}

// write writes runs of pages and syncs now and then, until that fails.
func (c *crasher) write() error {
	flags := os.O_RDWR
	if c.rng.IntN(4) == 0 {
		flags |= os.O_SYNC
	}
	f, err := os.OpenFile(c.path, flags, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	c.session = [crashPages]uint64{}
	for {
		for range 1 + c.rng.IntN(12) {
			first := c.rng.IntN(crashPages)
			n := min(1+c.rng.IntN(24), crashPages-first)
			c.version++
			var run []byte
			for p := first; p < first+n; p++ {
				c.written[p], c.session[p] = c.version, c.version
				run = append(run, page(p, c.version)...)
			}
			if _, err := f.WriteAt(run, int64(first)*4096); err != nil {
				return err
			}
			if flags&os.O_SYNC != 0 {
				copy(c.durable[first:first+n], c.session[first:first+n])
			}
		}
		if err := f.Sync(); err != nil {
			return err
		}
		// What an earlier session wrote and did not sync may be lost, and no
		// fsync of this one speaks for it.
		for p, v := range c.session {
			c.durable[p] = max(c.durable[p], v)
		}
		c.synced++
	}
}

// check reads every page of a file and returns the versions it found.
func (c *crasher) check(what, path string) []uint64 {
	c.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		c.t.Errorf("%s: %v", what, err)
		return nil
	}
	defer f.Close()
	content, err := io.ReadAll(f)
	if err != nil || len(content) != crashPages*4096 {
		c.t.Errorf("%s: read %d bytes, %v", what, len(content), err)
		return nil
	}
	seen := make([]uint64, crashPages)
	for n := range seen {
		got := content[n*4096 : (n+1)*4096]
		v := binary.LittleEndian.Uint64(got[8:])
		seen[n] = v
		switch {
		case !bytes.Equal(got, page(n, v)):
			c.t.Errorf("%s: page %d is no page that was ever written; it begins with % x", what, n, got[:32])
		case v < c.durable[n]:
			c.t.Errorf("%s: page %d has version %d, but fsync acknowledged %d", what, n, v, c.durable[n])
		case v > c.written[n]:
			c.t.Errorf("%s: page %d has version %d, newer than the last one written, %d", what, n, v, c.written[n])
		}
	}
	return seen
}
