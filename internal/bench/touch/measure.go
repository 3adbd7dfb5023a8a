package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/frontend/uffd"
	"github.com/memferry/memferry/internal/bench"
)

const (
	pageSize = 4096
	// apart is the distance of the pages that are touched at random: none of
	// them comes as the neighbour of another.
	apart = 64 << 10
	// duringReaders is how many threads touch pages at random during a pull.
	duringReaders = 4
	// hits is how many touches in a row without a fault show that all is here,
	// and fault what takes at least that long.
	hits  = 200
	fault = 500 * time.Microsecond
)

// touchAll loads a byte of each page, in order.
func touchAll(p []byte) (sum byte) {
	for i := 0; i < len(p); i += pageSize {
		sum ^= p[i]
	}
	return sum
}

func rate(metric string, n int, took time.Duration) bench.Value {
	return bench.Value{Metric: metric, Unit: "MB/s", Better: bench.Higher, X: float64(n) / 1e6 / took.Seconds()}
}

func latency(metric, unit string, per time.Duration, samples []time.Duration, p float64) bench.Value {
	var f []float64
	for _, s := range samples {
		f = append(f, float64(s)/float64(per))
	}
	return bench.Value{Metric: metric, Unit: unit, Better: bench.Lower, X: bench.Percentile(f, p)}
}

func (u user) firstTouch() ([]bench.Value, error) {
	before := time.Now()
	return u.with(func(m *uffd.Memory) ([]bench.Value, error) {
		begin := time.Now()
		sink.Store(uint32(touchAll(m.Bytes())))
		end := time.Now()
		n := int(m.Size())
		return []bench.Value{rate("rate", n, end.Sub(begin)), rate("rate with opening", n, end.Sub(before))}, nil
	})
}

// sink keeps the compiler from leaving out loads.
var sink atomic.Uint32

// plainWrite copies the file behind the URL into fresh memory that nobody has
// to serve: what the bytes cost anyway.
func (u user) plainWrite() ([]bench.Value, error) {
	f, err := os.Open(u.url)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	n := int(st.Size())
	from, err := unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, err
	}
	to, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	copy(to, from)
	return []bench.Value{rate("rate", n, time.Since(begin))}, nil
}

// random touches one page of each apart bytes, in random order.
func (u user) random() ([]bench.Value, error) {
	return u.with(func(m *uffd.Memory) ([]bench.Value, error) {
		p := m.Bytes()
		var took []time.Duration
		for _, i := range rand.Perm(len(p) / apart) {
			off := i*apart + rand.IntN(apart/pageSize)*pageSize
			begin := time.Now()
			sink.Store(uint32(p[off]))
			took = append(took, time.Since(begin))
		}
		return []bench.Value{
			latency("p50", "us", time.Microsecond, took, 50),
			latency("p99", "us", time.Microsecond, took, 99),
		}, nil
	})
}

// firstByte touches one page somewhere, as soon as the memory is there.
func (u user) firstByte() ([]bench.Value, error) {
	return u.with(func(m *uffd.Memory) ([]bench.Value, error) {
		p := m.Bytes()
		off := len(p)/2 + rand.IntN(len(p)/2)
		begin := time.Now()
		sink.Store(uint32(p[off]))
		return []bench.Value{latency("first byte", "ms", time.Millisecond, []time.Duration{time.Since(begin)}, 50)}, nil
	})
}

// during touches pages at random for as long as that faults. What counts is
// the latency of faults: of touches of pages that were absent.
func (u user) during() ([]bench.Value, error) {
	return u.with(func(m *uffd.Memory) ([]bench.Value, error) {
		p := m.Bytes()
		var mu sync.Mutex
		var all, faults []time.Duration
		var wg sync.WaitGroup
		for range duringReaders {
			wg.Go(func() {
				took, slow := touchUntilHere(p)
				mu.Lock()
				defer mu.Unlock()
				all, faults = append(all, took...), append(faults, slow...)
			})
		}
		wg.Wait()
		if len(faults) == 0 {
			return nil, fmt.Errorf("no touch met an absent page")
		}
		return []bench.Value{
			latency("fault p50", "ms", time.Millisecond, faults, 50),
			latency("fault p99", "ms", time.Millisecond, faults, 99),
			latency("touch p99", "ms", time.Millisecond, all, 99),
			{Metric: "faults", Unit: "count", Better: bench.Higher, X: float64(len(faults))},
		}, nil
	})
}

func touchUntilHere(p []byte) (all, faults []time.Duration) {
	var sum byte
	for here := 0; here < hits; here++ {
		off := rand.IntN(len(p))
		begin := time.Now()
		sum ^= p[off]
		took := time.Since(begin)
		all = append(all, took)
		if took >= fault {
			here = 0
			faults = append(faults, took)
		}
		// Somebody who only touches and never works would keep a processor from
		// the pull.
		time.Sleep(100 * time.Microsecond)
	}
	sink.Store(uint32(sum))
	return all, faults
}

// ready waits until everything is here and armed.
func ready(m *uffd.Memory) error {
	if err := m.Wait(context.Background()); err != nil {
		return err
	}
	if err := m.Populate(0, m.Size()); err != nil {
		return err
	}
	_, err := m.Dirty()
	return err
}

// detect writes to some pages and measures how long it takes to find them.
func (u user) detect(part float64) ([]bench.Value, error) {
	return u.with(func(m *uffd.Memory) ([]bench.Value, error) {
		if err := ready(m); err != nil {
			return nil, err
		}
		p := m.Bytes()
		pages := rand.Perm(len(p) / pageSize)[:max(1, int(float64(len(p)/pageSize)*part))]
		for _, i := range pages {
			p[i*pageSize]++
		}
		begin := time.Now()
		b, err := m.Dirty()
		took := time.Since(begin)
		if err == nil && b.Count() < int64(len(pages)) {
			err = fmt.Errorf("found %d of %d pages", b.Count(), len(pages))
		}
		return []bench.Value{
			latency("time", "ms", time.Millisecond, []time.Duration{took}, 50),
			{Metric: "found / written", Unit: "x", Better: bench.Lower, X: float64(b.Count()) / float64(len(pages))},
		}, err
	})
}

// firstWrite writes to pages that are armed.
func (u user) firstWrite() ([]bench.Value, error) {
	return u.with(func(m *uffd.Memory) ([]bench.Value, error) {
		if err := ready(m); err != nil {
			return nil, err
		}
		p := m.Bytes()
		var took []time.Duration
		for _, i := range rand.Perm(len(p) / pageSize)[:min(20000, len(p)/pageSize)] {
			begin := time.Now()
			p[i*pageSize]++
			took = append(took, time.Since(begin))
		}
		return []bench.Value{
			latency("p50", "us", time.Microsecond, took, 50),
			latency("p99", "us", time.Microsecond, took, 99),
		}, nil
	})
}

const (
	writerTime = time.Second
	scanEvery  = 100 * time.Millisecond
	writerPart = 64 << 20 // what the writer that stays in one place writes to
)

// writer fills memory over and over, with and without a scan every scanEvery,
// and tells how much of its speed it keeps.
func (u user) writer() ([]bench.Value, error) {
	return u.with(func(m *uffd.Memory) ([]bench.Value, error) {
		if err := ready(m); err != nil {
			return nil, err
		}
		var out []bench.Value
		for _, c := range []struct {
			metric string
			p      []byte
		}{{"speed kept, 64 MiB", m.Bytes()[:min(writerPart, len(m.Bytes()))]}, {"speed kept, all of it", m.Bytes()}} {
			fill(c.p, time.Now().Add(writerTime/2)) // no page is armed any more
			alone := fill(c.p, time.Now().Add(writerTime))
			stop, failed := make(chan struct{}), make(chan error, 1)
			go func() { failed <- scan(m, stop) }()
			scanned := fill(c.p, time.Now().Add(writerTime))
			close(stop)
			if err := <-failed; err != nil {
				return nil, err
			}
			out = append(out, bench.Value{Metric: c.metric, Unit: "x", Better: bench.Higher, X: scanned / alone})
		}
		return out, nil
	})
}

func scan(m *uffd.Memory, stop chan struct{}) error {
	t := time.NewTicker(scanEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if _, err := m.Dirty(); err != nil {
				return err
			}
		case <-stop:
			return nil
		}
	}
}

// fill writes every byte of p, over and over, and returns its rate in bytes per
// second.
func fill(p []byte, until time.Time) float64 {
	begin := time.Now()
	n := 0
	for round := byte(1); ; round++ {
		for at := 0; at < len(p); at += 64 << 10 {
			q := p[at:min(len(p), at+64<<10)]
			for i := range q {
				q[i] = round
			}
			n += len(q)
			if time.Now().After(until) {
				return float64(n) / time.Since(begin).Seconds()
			}
		}
	}
}
