package cache

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
	"github.com/memferry/memferry/internal/testenv"
)

const (
	envVictim   = "MEMFERRY_TEST_VICTIM" // the directory of its cache
	victimPages = 2000
)

func victimIdentity() Identity {
	return Identity{URL: "mem:?size=8000K", Size: victimPages * memferry.PageSize}
}

// victim is a process that uses a cache as a region does, until it is killed.
// Page p holds version v as a repeated integer. It says before each operation
// what it is about to do, and afterwards that it has:
//
//	w page version   write: intent, then data
//	s                sync of all before, followed by S when acknowledged
func victim(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(3)
		}
	}
	c, err := Open(dir, victimIdentity(), Options{JournalLimit: 4 << 10})
	fail(err)
	table := make([]chunk.PageState, victimPages)
	fail(c.Load(func(page, n int64, dirty bool) error {
		for p := page; p < page+n; p++ {
			table[p] = chunk.Present
			if dirty {
				table[p] = chunk.Dirty
			}
		}
		return nil
	}))
	fmt.Println("ready")
	changed := map[int64]bool{}
	version := uint64(time.Now().UnixNano())
	for {
		p := rand.Int64N(victimPages)
		switch rand.IntN(40) {
		case 0:
			fmt.Println("s")
			fail(c.Local().Sync())
			var changes []chunk.Change
			for p := range changed {
				changes = append(changes, chunk.Change{Page: p, N: 1, State: table[p]})
			}
			fail(c.Commit(changes))
			clear(changed)
			fmt.Println("S")
		default:
			version++
			fmt.Println("w", p, version)
			fail(c.Intend(p, 1))
			_, err := c.Local().WriteAt(victimPage(version), p*memferry.PageSize)
			fail(err)
			table[p] = chunk.Dirty
			if rand.IntN(3) == 0 { // pushed at once
				table[p] = chunk.Present
				fmt.Println("p", p, version)
			}
			changed[p] = true
		}
	}
}

func victimPage(version uint64) []byte {
	p := make([]byte, memferry.PageSize)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], version)
	}
	return p
}

// A real process on a real file system is killed at random instants; each time
// invariants 1 and 2 must hold for what it leaves.
func TestKill(t *testing.T) {
	r := testenv.Rand(t)
	dir := t.TempDir()
	rounds := 40
	if testenv.Race || testing.Short() {
		rounds = 8
	}
	acked := make([]uint64, victimPages)  // what a sync has acknowledged
	latest := make([]uint64, victimPages) // what a write was begun with
	remote := make([]uint64, victimPages) // what was pushed
	for round := range rounds {
		log := runVictim(t, dir, time.Duration(r.IntN(30_000))*time.Microsecond)
		var pending []uint64
		for _, line := range log {
			var p, v uint64
			switch {
			case scan(line, "w", &p, &v):
				latest[p] = v
			case scan(line, "p", &p, &v):
				remote[p] = v
			case line == "s":
				pending = append([]uint64(nil), latest...)
			case line == "S":
				copy(acked, pending)
			default:
				t.Fatalf("round %d: the victim said %q", round, line)
			}
		}
		checkVictim(t, round, dir, acked, latest, remote)
		if t.Failed() {
			return
		}
	}
}

func scan(line, verb string, p, v *uint64) bool {
	n, err := fmt.Sscanf(line, verb+" %d %d", p, v)
	return n == 2 && err == nil
}

// runVictim runs a victim, kills it some time after it is ready, and returns
// what it said since.
func runVictim(t *testing.T, dir string, after time.Duration) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), envVictim+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Errorf("the victim said %q", lines.Text())
	}
	timer := time.AfterFunc(after, func() { cmd.Process.Kill() })
	defer timer.Stop()
	var log []string
	for lines.Scan() {
		log = append(log, lines.Text())
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the victim ended with %v: %q", err, log[max(0, len(log)-1):])
	}
	return log
}

func checkVictim(t *testing.T, round int, dir string, acked, latest, remote []uint64) {
	t.Helper()
	c, err := Open(dir, victimIdentity(), Options{})
	if err != nil {
		t.Fatalf("round %d: %v", round, err)
	}
	state := make([]chunk.PageState, victimPages)
	err = c.Load(func(page, n int64, dirty bool) error {
		for p := page; p < page+n; p++ {
			state[p] = chunk.Present
			if dirty {
				state[p] = chunk.Dirty
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, memferry.PageSize)
	for p := range state {
		if _, err := c.Local().ReadAt(buf, int64(p)*memferry.PageSize); err != nil {
			t.Fatal(err)
		}
		got := binary.LittleEndian.Uint64(buf)
		if state[p] == chunk.Absent {
			got = remote[p]
		} else if string(buf) != string(victimPage(got)) {
			t.Errorf("round %d: page %d is torn", round, p)
		}
		switch {
		case got < acked[p] || got > latest[p]:
			t.Errorf("round %d: page %d (%v) has version %d, synced was %d, written %d", round, p, state[p], got, acked[p], latest[p])
		case state[p] == chunk.Present && got != remote[p]:
			t.Errorf("round %d: page %d is clean with version %d, the remote has %d", round, p, got, remote[p])
		}
		// What is only at the remote from now on is the truth.
		acked[p], latest[p] = got, got
		if state[p] == chunk.Dirty {
			continue
		}
		remote[p] = got
	}
	// As killed: the next victim finds what this one left.
	if err := c.release(); err != nil {
		t.Fatal(err)
	}
}
