package integration

import (
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/nbd"
)

// TestClientBlocks: writers that share the blocks of a server which refuses
// anything but whole ones. Each byte must be the one that was written last.
func TestClientBlocks(t *testing.T) {
	const writers, rounds, step, block = 5, 20, 1000, 4096
	want := pattern(20, mib)
	disk := file(t, "disk", want)
	c := dial(t, nbdkit(t, "--filter=blocksize-policy", "--filter=delay", "file", disk,
		"blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error",
		"delay-read=1ms", "delay-write=1ms"), nbd.ClientOptions{Connections: 4})
	write := func(seed uint64, off, n int64) {
		p := pattern(seed, n)
		if _, err := c.WriteAt(p, off); err != nil {
			t.Errorf("write of %d at %d: %v", n, off, err)
		}
		copy(want[off:], p) // nobody else's bytes
	}
	var wg sync.WaitGroup
	for w := range int64(writers) {
		wg.Go(func() {
			for i := range uint64(rounds) {
				write(i, w*step, step)
			}
		})
	}
	wg.Go(func() { // begins in the last writer's block, and is several requests
		for i := range uint64(rounds) {
			write(i, writers*step, 200_001)
		}
	})
	wg.Go(func() { // ends where that one ends, with a whole block after it
		const from = (writers*step + 200_001 + block - 1) / block * block
		for i := range uint64(rounds) {
			write(i, from, block)
			write(i, from-10, 10)
		}
	})
	wg.Wait()
	if err := c.Sync(); err != nil {
		t.Errorf("Sync: %v", err)
	}
	checkReads(t, c, want)
	holds(t, disk, want)
}

// TestClientRestarts kills a server that does not say so when it is another
// process. Each time one Sync fails, and only one, though each of several
// connections notices it by itself.
func TestClientRestarts(t *testing.T) {
	const rounds, block = 8, 64 * kib
	disk, socket := file(t, "disk", pattern(21, mib)), testenv.TempSocket(t)
	run := func() *process {
		if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		p := start(t, testenv.Program(t, "nbdkit"), "-f", "--exit-with-parent", "-U", socket, "file", disk)
		p.eventually("nbdkit", accepts("unix", socket))
		return p
	}
	p := run()
	defer func() { p.kill() }() // it would wait for the client to leave
	c := dial(t, unixURI(socket, ""), nbd.ClientOptions{Connections: 4, IOTimeout: hang})
	write := func() {
		var wg sync.WaitGroup
		for i := range int64(8) {
			wg.Go(func() {
				if _, err := c.WriteAt(pattern(uint64(i), block), i*block); err != nil {
					t.Errorf("write: %v", err)
				}
			})
		}
		wg.Wait()
	}
	for round := range rounds {
		for end := time.Now().Add(hang); c.Stats().Connections < 4; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d connections are up, want 4", c.Stats().Connections)
			}
		}
		write()
		p.kill()
		p = run()
		if err := c.Sync(); !errors.Is(err, nbd.ErrSyncLost) {
			t.Fatalf("round %d: Sync after a restart: %v, want ErrSyncLost", round, err)
		}
		for i := range 3 {
			write()
			if err := c.Sync(); err != nil {
				t.Fatalf("round %d: Sync %d after writing again: %v", round, i+2, err)
			}
		}
	}
}
