package region

import "time"

const (
	minWindow     = 256 << 10 // bytes in flight that any link is given
	maxWindow     = 256 << 20 // enough for 1 GB/s at 200 ms
	minPushWindow = 8 << 20   // demand fetches do not travel the same way as pushes
	startWindow   = 4 << 20   // doubles every round trip until the link is full

	pacerRounds = 10               // round trips that the rate is remembered for
	rttMemory   = 10 * time.Second // how long the smallest round trip is believed
	rttProbe    = 200 * time.Millisecond

	growth      = 1.25 // a round that grows less than this is a sign of a full link
	fullRounds  = 3    // and so many of them are the proof
	gainStart   = 2.2  // twice, so that it can double, and a little
	gainCruise  = 1.15
	gainProbe   = 1.4
	gainDrain   = 1.0
	cycleRounds = 8 // one of which probes, and one drains
	queueSlack  = 4 * time.Millisecond

	// yieldRTT is up to where the pull yields to whoever waits: on a longer
	// link what is queued beyond its capacity is little beside the round trip.
	yieldRTT = 5 * time.Millisecond

	// What keeps a link without delay busy between wake-ups: bytes, but no
	// longer than this on the wire.
	pacerQuantum     = 512 << 10
	pacerQuantumTime = 500 * time.Microsecond
)

// pacer decides how many bytes may be in flight. It follows BBR (Cardwell et
// al., ACM Queue 14-5, 2016): what a link carries is the largest delivery rate
// of late times the smallest round trip of late; more than that only queues,
// and makes demand fetches wait. It starts by doubling per round trip.
//
// It is pure: time is passed in, and its owner's lock guards it.
type pacer struct {
	window   int64
	floor    int64 // bounds of window
	limit    int64
	inFlight int64

	delivered   int64 // bytes, ever
	deliveredAt time.Time

	rates    [pacerRounds]float64 // bytes per second, best of each round
	round    int
	roundEnd int64 // delivered, at which the round is over
	limited  bool  // this round, the window was what held us back

	rtt      time.Duration // 0: unknown
	rttAt    time.Time
	probing  time.Time // zero, or when a look for a smaller round trip ends
	probeRTT time.Duration

	full     bool // the link's capacity was found
	fullRate float64
	flat     int // rounds without growth
}

// flight is one request as the pacer sees it.
type flight struct {
	sent        time.Time
	delivered   int64
	deliveredAt time.Time
	left        int64
	answered    bool
}

func newPacer(floor, limit int64) *pacer {
	return &pacer{window: max(startWindow, floor), floor: floor, limit: limit}
}

// room reports whether n bytes more may be sent. One request always may.
func (p *pacer) room(n int64) bool {
	if p.inFlight == 0 || p.inFlight+n <= p.window {
		return true
	}
	p.limited = true
	return false
}

// yields reports whether n bytes more should wait because somebody waits for
// something else: they would only queue, and on a short link the slack that
// keeps it busy takes longer than its round trip. What the link holds stays in
// flight, so that it is used all the same.
//
// A round in which this was so is not limited: its lower rate tells nothing of
// the link, and taken for its capacity would make the next one lower still.
func (p *pacer) yields(n int64) bool {
	if p.rtt == 0 || p.rtt > yieldRTT || p.inFlight == 0 || p.rate() == 0 {
		return false
	}
	return p.inFlight+n > max(p.floor, int64(p.bdp()))
}

func (p *pacer) send(now time.Time, n int64) flight {
	if p.inFlight == 0 {
		p.deliveredAt = now
	}
	p.inFlight += n
	return flight{sent: now, delivered: p.delivered, deliveredAt: p.deliveredAt, left: n}
}

// deliver records that n bytes of f have arrived.
func (p *pacer) deliver(now time.Time, f *flight, n int64) {
	n = min(n, f.left)
	f.left -= n
	p.inFlight -= n
	p.delivered += n
	p.deliveredAt = now
	if !f.answered {
		f.answered = true
		p.sample(now, now.Sub(f.sent))
	}
	if took := now.Sub(f.deliveredAt); took > 0 && took >= p.rtt {
		rate := float64(p.delivered-f.delivered) / took.Seconds()
		p.rates[p.round] = max(p.rates[p.round], rate)
	}
	if f.delivered >= p.roundEnd {
		p.endRound()
	}
	p.resize(now, n)
}

// end gives back what f did not deliver.
func (p *pacer) end(f *flight) {
	p.inFlight -= f.left
	f.left = 0
}

// sample learns from one round trip, which may be of another class.
func (p *pacer) sample(now time.Time, rtt time.Duration) {
	rtt = max(rtt, time.Microsecond)
	if p.rtt == 0 || rtt <= p.rtt {
		p.rtt, p.rttAt = rtt, now
	}
	if !p.full && rtt > p.rtt+p.rtt/4+queueSlack {
		p.full = true // a queue has built up
	}
	switch {
	case !p.probing.IsZero():
		if p.probeRTT == 0 || rtt < p.probeRTT {
			p.probeRTT = rtt
		}
		if now.After(p.probing) {
			p.rtt, p.rttAt, p.probing = p.probeRTT, now, time.Time{}
		}
	case now.Sub(p.rttAt) > rttMemory:
		p.probing, p.probeRTT = now.Add(max(rttProbe, 2*p.rtt)), 0
	}
}

func (p *pacer) endRound() {
	if !p.full && p.limited {
		if r := p.rate(); r >= p.fullRate*growth {
			p.fullRate, p.flat = r, 0
		} else if p.flat++; p.flat >= fullRounds {
			p.full = true
		}
	}
	p.roundEnd = p.delivered
	// A round that was short of work says nothing against an earlier one.
	if p.limited {
		p.round = (p.round + 1) % pacerRounds
		p.rates[p.round] = 0
	}
	p.limited = false
}

// rate returns the link's capacity in bytes per second, 0 if unknown.
func (p *pacer) rate() float64 {
	r := 0.0
	for _, v := range p.rates {
		r = max(r, v)
	}
	return r
}

// bdp returns how many bytes fill the link.
func (p *pacer) bdp() float64 { return p.rate() * p.rtt.Seconds() }

func (p *pacer) resize(now time.Time, n int64) {
	switch {
	case !p.full:
		if p.limited {
			p.window += n
			if b := int64(gainStart * p.bdp()); b > startWindow {
				p.window = min(p.window, b)
			}
		}
	case !p.probing.IsZero() && now.Before(p.probing):
		p.window = int64(p.bdp() / 2)
	default:
		gain := gainCruise
		switch p.round % cycleRounds {
		case 0:
			gain = gainProbe
		case 1:
			gain = gainDrain
		}
		slack := max(pacerQuantumTime, p.rtt/10)
		p.window = int64(gain*p.bdp() + min(pacerQuantum, p.rate()*slack.Seconds()))
	}
	p.window = min(max(p.window, p.floor), p.limit)
}

// due estimates when n bytes that are sent now will have arrived; false where
// nothing is known.
func (p *pacer) due(now time.Time, n int64) (time.Time, bool) {
	r := p.rate()
	if r == 0 || p.rtt == 0 {
		return time.Time{}, false
	}
	wire := p.rtt + seconds(float64(n)/r)
	queue := seconds(float64(p.inFlight+n) / r)
	return now.Add(max(wire, queue)), true
}

func seconds(s float64) time.Duration {
	return time.Duration(min(s, 1e6) * float64(time.Second))
}
