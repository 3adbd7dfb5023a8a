package region

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/internal/testenv"
)

// link is a wire with a delay and a bandwidth, in a synctest bubble.
type link struct {
	rtt  time.Duration
	rate float64 // bytes per second

	mu   sync.Mutex
	free time.Time
}

// pass waits until n bytes that were asked for now have come.
func (l *link) pass(ctx context.Context, n int64) {
	sleep(ctx, l.rtt/2)
	l.mu.Lock()
	now := time.Now()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(seconds(float64(n) / l.rate))
	at := l.free.Add(l.rtt / 2)
	l.mu.Unlock()
	sleep(ctx, at.Sub(now))
}

// linked is a remote behind a link that streams.
type linked struct {
	*mem.Backend
	l *link
}

// Capabilities leaves out extents: every byte is to travel.
func (b linked) Capabilities() memferry.Capabilities {
	return memferry.Capabilities{StreamReader: b, ContextWriter: b}
}

func (b linked) ReadStream(ctx context.Context, off, n int64, sink func(off, n int64, p []byte) error) error {
	b.l.pass(ctx, n)
	p := make([]byte, n)
	if _, err := b.ReadAt(p, off); err != nil {
		return err
	}
	return sink(off, n, p)
}

func (b linked) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	b.l.pass(ctx, int64(len(p)))
	return b.WriteAt(p, off)
}

// TestLinkIsFilled pulls behind links from short to long, and reads at random
// meanwhile. Time is virtual, so that the bounds can be close.
func TestLinkIsFilled(t *testing.T) {
	// The order of goroutines that are ready at once is left to chance, the more
	// so under the race detector. A window that does not grow, or a pull that
	// goes before reads, misses by more than this.
	slack := 1
	if testenv.Race {
		slack = 2
	}
	const size = 512 << 20
	for _, c := range []struct {
		rtt  time.Duration
		rate float64
		// overhead is how many round trips the pull may take beyond the time
		// that its bytes take.
		overhead int
	}{
		{time.Millisecond, 1e9, 20},
		{10 * time.Millisecond, 1e9, 10},
		{50 * time.Millisecond, 1e9, 8},
		{200 * time.Millisecond, 1e9, 8},
		{20 * time.Millisecond, 50e6, 10},
	} {
		t.Run(fmt.Sprint(c.rtt, " ", c.rate/1e6, "MB/s"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				remote, _ := mem.New(size)
				local, _ := mem.New(size)
				l := &link{rtt: c.rtt, rate: c.rate}
				r := open2(t, linked{remote, l}, local, Options{})
				start := time.Now()
				waits := randomReads(t, r, c.rtt)
				if err := r.Pull(context.Background()); err != nil {
					t.Fatal(err)
				}
				took := time.Since(start)
				most := seconds(size/c.rate)*12/10 + time.Duration(slack*c.overhead)*c.rtt
				ws := waits()
				slices.Sort(ws)
				if len(ws) == 0 {
					t.Fatal("no read had to wait")
				}
				p50, p99 := ws[len(ws)/2], ws[len(ws)*99/100]
				s := r.Stats()
				t.Logf("%v, at most %v; %d waits, p50 %v, p99 %v; rtt %v, rate %d MB/s, window %d MiB", took, most, len(ws), p50, p99, s.RTT, s.Rate/1e6, s.Window>>20)
				if took > most {
					t.Errorf("the pull took %v, at most %v expected", took, most)
				}
				// The pull itself may not queue longer than half a round trip. On
				// the slow link the pacer's smallest pieces take 1.3 ms each.
				limit := c.rtt*3/2 + 5*time.Millisecond
				if c.rate < 100e6 {
					limit = 2 * c.rtt
				}
				if limit *= time.Duration(slack); p99 > limit {
					t.Errorf("p99 of random reads %v, at most %v expected", p99, limit)
				}
				_ = r.Close()
			})
		})
	}
}

// randomReads reads pages until the region is complete. The function that it
// returns gives the times of those that waited, once that is so.
func randomReads(t *testing.T, r *Region, rtt time.Duration) func() []time.Duration {
	var ws []time.Duration
	var wg sync.WaitGroup
	rnd := rand.New(rand.NewPCG(1, 2))
	start := time.Now()
	wg.Go(func() {
		p := make([]byte, pageSize)
		for !r.Complete() {
			off := rnd.Int64N(r.size/pageSize) * pageSize
			resident := r.Resident(off, pageSize)
			at := time.Now()
			if _, err := r.ReadAt(p, off); err != nil {
				t.Error(err)
				return
			}
			// The first round trips find out what the link carries, and queue.
			if !resident && at.Sub(start) > max(6*rtt, 100*time.Millisecond) {
				ws = append(ws, time.Since(at))
			}
			time.Sleep(time.Millisecond)
		}
	})
	return func() []time.Duration { wg.Wait(); return ws }
}
