package region

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/memferry/memferry/backend/mem"
)

// wire is a link with one queue, and the time that goes by on it. Requests are
// sent whenever the pacer has room, and arrive in order.
type wire struct {
	p    *pacer
	rtt  time.Duration
	rate float64 // bytes per second
	size int64   // of a request

	now  time.Time
	free time.Time // when the wire has carried what was sent
	sent []packet
}

type packet struct {
	f  flight
	at time.Time // when it arrives
}

func newWire(p *pacer, rtt time.Duration, bytesPerSecond float64) *wire {
	return &wire{p: p, rtt: rtt, rate: bytesPerSecond, size: 64 << 10, now: time.Unix(1000, 0)}
}

// fill sends what there is room for, up to most requests.
func (w *wire) fill(most int) {
	for ; most > 0 && w.p.room(w.size); most-- {
		if w.free.Before(w.now) {
			w.free = w.now
		}
		w.free = w.free.Add(seconds(float64(w.size) / w.rate))
		w.sent = append(w.sent, packet{w.p.send(w.now, w.size), w.free.Add(w.rtt)})
	}
}

// step lets the next request arrive.
func (w *wire) step() {
	k := &w.sent[0]
	w.now = k.at
	w.p.deliver(w.now, &k.f, w.size)
	w.p.end(&k.f)
	w.sent = w.sent[1:]
}

// run keeps the wire busy for a time.
func (w *wire) run(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); {
		w.fill(1 << 20)
		w.step()
	}
}

// bdp is what the wire holds.
func (w *wire) bdp() float64 { return w.rate * (w.rtt + seconds(float64(w.size)/w.rate)).Seconds() }

// TestPacerFindsTheLink: whatever the round trip, the window comes to hold what
// the link does, and a bounded part more.
func TestPacerFindsTheLink(t *testing.T) {
	const mb = 1e6
	for _, rtt := range []time.Duration{0, 100 * time.Microsecond, time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond} {
		for _, speed := range []float64{10 * mb, 100 * mb, 1000 * mb} {
			t.Run(fmt.Sprint(rtt, " ", speed/mb, "MB/s"), func(t *testing.T) {
				w := newWire(newPacer(minWindow, maxWindow), rtt, speed)
				w.run(20*rtt + time.Second) // less than rttMemory: the look for a smaller one costs
				if got := w.p.rate(); got < 0.95*speed || got > 1.05*speed {
					t.Errorf("rate %.0f MB/s, the link's is %.0f", got/mb, speed/mb)
				}
				if least := min(w.bdp(), maxWindow); float64(w.p.window) < 0.95*least {
					t.Errorf("a window of %d bytes does not fill a link that holds %.0f", w.p.window, least)
				}
				most := max(minWindow, gainProbe*w.p.bdp()+pacerQuantum)
				if float64(w.p.window) > most {
					t.Errorf("a window of %d bytes, at most %.0f expected", w.p.window, most)
				}
				before := w.now
				delivered := w.p.delivered
				w.run(10*rtt + 100*time.Millisecond)
				if got := float64(w.p.delivered-delivered) / w.now.Sub(before).Seconds(); got < 0.95*speed {
					t.Errorf("carried %.0f MB/s of %.0f", got/mb, speed/mb)
				}
			})
		}
	}
}

// TestPacerStartsByDoubling: a round trip with a full window about doubles it;
// one that was short of work does not.
func TestPacerStartsByDoubling(t *testing.T) {
	const rtt = 200 * time.Millisecond
	w := newWire(newPacer(minWindow, maxWindow), rtt, 10e9)
	if w.p.window != startWindow {
		t.Fatalf("starts with %d bytes, want %d", w.p.window, startWindow)
	}
	w.run(rtt / 2) // up to the first answer
	for round := range 5 {
		before := w.p.window
		w.run(rtt)
		if got := w.p.window; got < before*3/2 || got > before*5/2 {
			t.Errorf("round %d: from %d to %d bytes", round, before, got)
		}
	}
	if w.p.window < startWindow<<4 || w.p.full {
		t.Errorf("a window of %d bytes after 5 round trips, full %v", w.p.window, w.p.full)
	}
	idle := newWire(newPacer(minWindow, maxWindow), rtt, 10e9)
	for range 50 {
		idle.fill(4)
		for len(idle.sent) > 0 {
			idle.step()
		}
	}
	if idle.p.window != startWindow {
		t.Errorf("a window of %d bytes after requests that never filled it", idle.p.window)
	}
}

// TestPacerFollowsTheLink: a link that becomes slower makes the window shrink,
// one that becomes faster makes it grow again.
func TestPacerFollowsTheLink(t *testing.T) {
	w := newWire(newPacer(minWindow, maxWindow), 20*time.Millisecond, 500e6)
	w.run(2 * time.Second)
	fast := w.p.window
	w.rate = 50e6
	w.run(3 * time.Second)
	if slow := w.p.window; slow > fast/4 {
		t.Errorf("from %d to %d bytes on a tenth of the bandwidth", fast, slow)
	}
	if got := w.p.rate(); got > 55e6 {
		t.Errorf("rate %.0f MB/s, now the link's is 50", got/1e6)
	}
	w.rate = 500e6
	w.run(5 * time.Second)
	if w.p.window < fast*8/10 {
		t.Errorf("a window of %d bytes, with the same bandwidth it was %d", w.p.window, fast)
	}
}

// TestPacerBounds: the floor and the limit hold, and one request always may.
func TestPacerBounds(t *testing.T) {
	w := newWire(newPacer(minPushWindow, maxWindow), 100*time.Microsecond, 10e6)
	w.run(2 * time.Second)
	if w.p.window != minPushWindow {
		t.Errorf("a window of %d bytes on a link that holds less than the floor of %d", w.p.window, minPushWindow)
	}
	w = newWire(newPacer(minWindow, maxBuffered), 200*time.Millisecond, 10e9)
	w.run(10 * time.Second)
	if w.p.window != maxBuffered {
		t.Errorf("a window of %d bytes on a link that holds more than the limit of %d", w.p.window, maxBuffered)
	}
	p := newPacer(minWindow, maxWindow)
	if !p.room(1 << 40) {
		t.Error("no room for one request")
	}
	f := p.send(time.Unix(1, 0), 1<<40)
	if p.room(1) {
		t.Error("room beside a request that takes it all")
	}
	p.end(&f)
	if p.inFlight != 0 || !p.room(1<<40) {
		t.Errorf("%d bytes in flight after a request that failed", p.inFlight)
	}
}

// TestPacerBelievesALongerRoundTripInTime: the smallest round trip is looked
// for again when it is old, with half of the link in flight.
func TestPacerBelievesALongerRoundTripInTime(t *testing.T) {
	w := newWire(newPacer(minWindow, maxWindow), 10*time.Millisecond, 200e6)
	w.run(2 * time.Second)
	w.rtt = 40 * time.Millisecond
	w.run(rttMemory - 3*time.Second)
	if w.p.rtt > 12*time.Millisecond {
		t.Fatalf("a round trip of %v, before the old one was forgotten", w.p.rtt)
	}
	w.run(6 * time.Second)
	if w.p.rtt < 40*time.Millisecond || w.p.rtt > 45*time.Millisecond {
		t.Errorf("a round trip of %v, the link's is 40 ms", w.p.rtt)
	}
	if float64(w.p.window) < 0.95*w.bdp() {
		t.Errorf("a window of %d bytes does not fill a link that holds %.0f", w.p.window, w.bdp())
	}
}

// TestPacerYields: while somebody waits, a short link is kept full and no more;
// a long one, and one that is unknown, is left alone.
func TestPacerYields(t *testing.T) {
	if p := newPacer(minWindow, maxWindow); p.yields(1 << 30) {
		t.Error("yields before anything is known")
	}
	for _, c := range []struct {
		rtt    time.Duration
		yields bool
	}{{200 * time.Microsecond, true}, {time.Millisecond, true}, {4 * time.Millisecond, true}, {10 * time.Millisecond, false}, {200 * time.Millisecond, false}} {
		w := newWire(newPacer(minWindow, maxWindow), c.rtt, 1e9)
		w.run(time.Second + 20*c.rtt)
		w.fill(1 << 20)
		if got := w.p.yields(w.size); got != c.yields {
			t.Errorf("%v: a full window yields: %v, want %v", c.rtt, got, c.yields)
		}
		// Somebody waits all the time.
		delivered, before := w.p.delivered, w.now
		for range 10000 {
			for !w.p.yields(w.size) && w.p.inFlight+w.size <= w.p.window {
				w.fill(1)
			}
			w.step()
		}
		carried := float64(w.p.delivered-delivered) / w.now.Sub(before).Seconds()
		if carried < 0.9*w.rate {
			t.Errorf("%v: carried %.0f MB/s of %.0f", c.rtt, carried/1e6, w.rate/1e6)
		}
		if c.yields && float64(w.p.inFlight) > max(minWindow, 1.02*w.p.bdp()) {
			t.Errorf("%v: %d bytes in flight, the link holds %.0f", c.rtt, w.p.inFlight, w.bdp())
		}
	}
}

// TestPacerDue: an answer is expected after a round trip and its turn in the
// queue.
func TestPacerDue(t *testing.T) {
	now := time.Unix(1000, 0)
	if _, ok := newPacer(minWindow, maxWindow).due(now, 4096); ok {
		t.Error("something is expected of a link of which nothing is known")
	}
	w := newWire(newPacer(minWindow, maxWindow), 10*time.Millisecond, 100e6)
	w.run(time.Second)
	for len(w.sent) > 0 {
		w.step()
	}
	for _, c := range []struct {
		inFlight int64
		want     time.Duration
	}{{0, 11 * time.Millisecond}, {500e3, 11 * time.Millisecond}, {5e6, 50 * time.Millisecond}} {
		w.p.inFlight = c.inFlight
		at, ok := w.p.due(w.now, 4096)
		if got := at.Sub(w.now); !ok || got < c.want*9/10 || got > c.want*11/10 {
			t.Errorf("%d bytes ahead: due in %v, want about %v", c.inFlight, got, c.want)
		}
	}
}

// TestPullLimiter: the bound on background pulls lets a tenth of a second
// through at once, within bounds.
func TestPullLimiter(t *testing.T) {
	if limiter(0) != nil {
		t.Error("a limiter without a limit")
	}
	for _, c := range []struct {
		perSecond int64
		burst     int
	}{{1, 64 << 10}, {1 << 20, 1 << 20 / 10}, {100 << 20, 10 << 20}, {10 << 30, 16 << 20}} {
		l := limiter(c.perSecond)
		if l.Burst() != max(c.burst, 64<<10) || l.Limit() != rate.Limit(c.perSecond) {
			t.Errorf("%d bytes per second: burst %d, limit %v", c.perSecond, l.Burst(), l.Limit())
		}
	}
}

// TestRequestBytes: requests are a chunk long, but so that several are in
// flight, and within bounds.
func TestRequestBytes(t *testing.T) {
	for _, c := range []struct{ window, chunk, want int64 }{
		{minWindow, DefaultChunkSize, minWindow / minParts},
		{4 << 20, DefaultChunkSize, 256 << 10},
		{16 << 20, DefaultChunkSize, 1 << 20},
		{256 << 20, MinChunkSize, maxFetch},
		{4 << 20, MaxChunkSize, 1 << 20},
		{100 << 10, MinChunkSize, minFetch},
	} {
		if got := requestBytes(&pacer{window: c.window}, c.chunk); got != c.want {
			t.Errorf("window %d, chunk %d: %d bytes, want %d", c.window, c.chunk, got, c.want)
		}
	}
}

// TestPullYieldsToDemand: while a demand fetch is under way, the pull does not
// send what would only queue on a short link; afterwards it does.
func TestPullYieldsToDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 64 << 20
		remote, _ := mem.New(size)
		local, _ := mem.New(size)
		r := open2(t, linked{remote, &link{rtt: time.Millisecond, rate: 1e9}}, local, Options{Pull: PullDemand})
		if _, err := r.ReadAt(make([]byte, pageSize), size/2); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.mu.Lock()
		if r.demands != 0 {
			t.Errorf("%d demand fetches under way after the only one", r.demands)
		}
		r.pull.full = true
		p := r.pull.pace
		p.rtt, p.rates[p.round], p.full, p.window = time.Millisecond, 1e9, true, 2<<20
		p.inFlight += 1 << 20 // what the link holds
		r.demands++
		if more, _ := r.pullOneLocked(time.Now()); more {
			t.Error("the pull queues before a demand fetch")
		}
		r.demands--
		if more, _ := r.pullOneLocked(time.Now()); !more {
			t.Error("the pull waits for nobody")
		}
		p.inFlight -= 1 << 20
		r.mu.Unlock()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
}
