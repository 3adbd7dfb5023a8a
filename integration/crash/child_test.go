package crash

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/memferry/memferry/region"
)

const (
	envDir   = "MEMFERRY_TEST_CRASH_DIR"
	envRound = "MEMFERRY_TEST_CRASH_ROUND"
)

// child uses a region until it is killed, or ends in order after a while. It
// says what it is about to do before, and that it is done after; each line is
// one write(2), so that the lines of several goroutines don't mix and none is
// left in a buffer.
func child(dir string) {
	round, err := strconv.Atoi(os.Getenv(envRound))
	check(err)
	reg, err := openRegion(context.Background(), dir)
	check(err)
	say("ready")
	end := time.Now().Add(350 * time.Millisecond)
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() { writeCells(reg, i, uint64(round+1)<<40|uint64(i)<<32, end) })
	}
	wg.Go(func() { readCells(reg, end) })
	for time.Now().Before(end) {
		time.Sleep(rand.N(20 * time.Millisecond))
		say("s")
		check(reg.Sync())
		say("S")
	}
	wg.Wait()
	check(reg.Close())
	say("closed")
	os.Exit(0)
}

func say(format string, args ...any) {
	if _, err := fmt.Fprintf(os.Stdout, format+"\n", args...); err != nil {
		os.Exit(2) // the parent has ended
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
}

// writeCells writes runs of cells, in pages of its own so that the order of
// writes to a cell is the order in which they are said: parts of pages, whole
// pages, several of them, and zeroes.
func writeCells(reg *region.Region, writer int, version uint64, end time.Time) {
	const stripe = 4 * pageCells // each writer has every fourth run of four pages
	stripes := cells / stripe / writers
	for time.Now().Before(end) {
		first := (rand.IntN(stripes)*writers + writer) * stripe
		n := stripe
		switch rand.IntN(4) {
		case 0: // part of a page
			first += rand.IntN(stripe - pageCells)
			n = 1 + rand.IntN(pageCells)
		case 1: // a page
			first += rand.IntN(4) * pageCells
			n = pageCells
		}
		version++
		v := version
		zero := rand.IntN(8) == 0
		if zero {
			v = 0
		}
		say("w %d %d %d %d", writer, first, n, v)
		if zero {
			check(reg.WriteZeroes(int64(first)*cell, int64(n)*cell, 0))
		} else {
			var p []byte
			for range n {
				p = append(p, cellOf(v)...)
			}
			_, err := reg.WriteAt(p, int64(first)*cell)
			check(err)
		}
		say("d %d", writer)
		if rand.IntN(4) == 0 {
			time.Sleep(rand.N(5 * time.Millisecond))
		}
	}
}

// readCells makes demand fetches.
func readCells(reg *region.Region, end time.Time) {
	p := make([]byte, 3*cell)
	for time.Now().Before(end) {
		_, err := reg.ReadAt(p, rand.Int64N(regionSize-int64(len(p))))
		check(err)
		time.Sleep(rand.N(2 * time.Millisecond))
	}
}
