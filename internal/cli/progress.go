package cli

import (
	"context"
	"fmt"
	"io"
	"math"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/memferry/memferry/internal/size"
)

// How often progress is shown.
const (
	barInterval  = 150 * time.Millisecond
	lineInterval = 5 * time.Second
)

// sample is one look at something that advances.
type sample struct {
	done, total int64
	note        string // rates and the like, for people
}

// progress shows what sample returns until ctx ends: as a bar on a terminal,
// above which log lines scroll, otherwise as a line now and then when
// something has changed. Sampling must not block.
type progress struct {
	label    string
	sample   func() sample
	terminal bool
	out      io.Writer
	sink     *logSink
	interval time.Duration // of lines; 0 means lineInterval
}

// startProgress runs p in the background; stop shows the final state, and
// returns the terminal.
func startProgress(p progress) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if p.terminal {
			p.bar(ctx)
		} else {
			p.lines(ctx)
		}
	}()
	return func() { cancel(); <-done }
}

func (p progress) lines(ctx context.Context) {
	every := p.interval
	if every == 0 {
		every = lineInterval
	}
	t := time.NewTicker(every)
	defer t.Stop()
	var last sample
	shown := false
	show := func() {
		if s := p.sample(); s != last {
			last, shown = s, true
			fmt.Fprintln(p.out, p.label+": "+s.String())
		}
	}
	for {
		select {
		case <-t.C:
			show()
		case <-ctx.Done():
			if shown { // what ends at once needs no line
				show()
			}
			return
		}
	}
}

func (s sample) String() string {
	text := fmt.Sprintf("%s of %s (%.0f%%)", size.Format(s.done), size.Format(s.total), percent(s.done, s.total))
	if s.note != "" {
		text += ", " + s.note
	}
	return text
}

func (p progress) bar(ctx context.Context) {
	c := mpb.New(mpb.WithOutput(p.out), mpb.WithRefreshRate(barInterval), mpb.WithAutoRefresh())
	var now atomic.Pointer[sample] // the bar reads it in its own time
	first := p.sample()
	now.Store(&first)
	// A total of 0 at first keeps the bar from ending by itself, for a region may
	// go backwards, and lets SetTotal have an effect.
	b := c.New(0, mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]"),
		mpb.BarWidth(30),
		mpb.PrependDecorators(decor.Name(p.label+" ")),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return " " + now.Load().String() })),
	)
	old := p.sink.swap(c)
	t := time.NewTicker(barInterval)
	defer t.Stop()
	set := func() {
		s := p.sample()
		b.SetTotal(max(s.total, 1), false)
		b.SetCurrent(s.done)
		now.Store(&s)
	}
	for {
		select {
		case <-t.C:
			set()
			continue
		case <-ctx.Done():
		}
		break
	}
	set()
	b.Abort(false)
	c.Wait()
	p.sink.swap(old)
}

// meter turns a growing count into a rate: an exponential mean.
type meter struct {
	last  int64
	at    time.Time
	began bool    // value is of at least one interval
	value float64 // bytes per second
}

// meterHalfLife is the time after which half of a rate is forgotten.
const meterHalfLife = time.Second

func (m *meter) update(count int64, now time.Time) int64 {
	if m.at.IsZero() {
		m.last, m.at = count, now
		return 0
	}
	dt := now.Sub(m.at)
	if dt < 50*time.Millisecond {
		return int64(m.value)
	}
	rate := float64(count-m.last) / dt.Seconds()
	if m.began {
		old := math.Exp2(-dt.Seconds() / meterHalfLife.Seconds())
		rate = old*m.value + (1-old)*rate
	}
	if rate < 1 {
		rate = 0
	}
	m.last, m.at, m.began, m.value = count, now, true, rate
	return int64(rate)
}
