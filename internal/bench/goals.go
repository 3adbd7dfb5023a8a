package bench

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Goal is a figure that memferry sets itself: Subject's median divided by the
// best of Against must be at least Bound, or at most where less is better.
// Without Against, Bound is in the metric's own unit.
type Goal struct {
	Group, Scenario, Metric, Subject string
	Against                          []string
	Better                           Better
	Bound                            float64
}

// Verdict is a goal with its measurement.
type Verdict struct {
	Goal     Goal
	Measured float64
	Met      bool
	Missing  string // why it was not measured
}

// Judge holds the goals against what was measured. Goals whose scenario was
// not part of the run are left out.
func (r *Report) Judge(goals []Goal) []Verdict {
	var out []Verdict
	for _, g := range goals {
		if !r.ran(g.Group, g.Scenario) {
			continue
		}
		out = append(out, r.judge(g))
	}
	return out
}

// ran tells whether anything of a scenario was measured, or should have been.
func (r *Report) ran(group, scenario string) bool {
	return slices.ContainsFunc(r.results, func(x *Result) bool { return x.Group == group && x.Scenario == scenario }) ||
		slices.ContainsFunc(r.failures, func(f failure) bool { return f.group == group && f.scenario == scenario })
}

func (r *Report) judge(g Goal) Verdict {
	own, ok := r.find(g.Group, g.Scenario, g.Metric, g.Subject)
	if !ok {
		return Verdict{Goal: g, Missing: "no figure of " + g.Subject}
	}
	v := Verdict{Goal: g, Measured: own}
	if len(g.Against) > 0 {
		peer := math.NaN()
		for _, name := range g.Against {
			x, ok := r.find(g.Group, g.Scenario, g.Metric, name)
			if ok && (math.IsNaN(peer) || (g.Better == Lower) == (x < peer)) {
				peer = x
			}
		}
		if math.IsNaN(peer) || peer == 0 {
			return Verdict{Goal: g, Missing: "no figure of " + strings.Join(g.Against, ", ")}
		}
		v.Measured = own / peer
	}
	if g.Better == Lower {
		v.Met = v.Measured <= g.Bound
	} else {
		v.Met = v.Measured >= g.Bound
	}
	return v
}

// Goals are all that the project promises.
func Goals() []Goal {
	return slices.Concat(nbdGoals(), fuseGoals(), linkGoals(), memoryGoals(), uffdGoals())
}

func nbdGoals() []Goal {
	var out []Goal
	all := []string{"nbdkit memory", "qemu-nbd", "go-nbd memory"}
	for _, network := range []string{"unix", "tcp"} {
		for _, pair := range [][2]string{{"memferry mem", "nbdkit memory"}, {"memferry file", "nbdkit file"}} {
			ours, theirs := pair[0], pair[1]
			out = append(out,
				Goal{"nbd", "read " + network, "rate", ours, []string{theirs}, Higher, 1.15},
				Goal{"nbd", "write " + network, "rate", ours, []string{theirs}, Higher, 1.1},
				Goal{"nbd", "4K random read depth 32 " + network, "IOPS", ours, []string{theirs}, Higher, 1.3},
				Goal{"nbd", "read " + network, "server CPU", ours, []string{theirs}, Lower, 1},
			)
		}
		out = append(out, Goal{"nbd", "4K random read depth 1 " + network, "p50", "memferry mem", all, Lower, 1})
	}
	return out
}

func fuseGoals() []Goal {
	theirs := []string{"nbdfuse on nbdkit"}
	return []Goal{
		{"fuse", "O_DIRECT 1M read", "rate", "memferry", theirs, Higher, 2.5},
		{"fuse", "cat, cold", "rate", "memferry", theirs, Higher, 2.5},
		{"fuse", "4K random read, O_DIRECT", "p50", "memferry", theirs, Lower, 0.6},
		{"fuse", "mmap sequential, cold", "rate", "memferry", theirs, Higher, 1.5},
		{"fuse", "passthrough 1M read", "rate", "memferry", []string{"tmpfs"}, Higher, 0.8},
	}
}

func linkGoals() []Goal {
	var out []Goal
	for _, rtt := range linkRTTs {
		ms := float64(rtt.Milliseconds())
		at := fmt.Sprintf(" at %v", rtt)
		out = append(out,
			Goal{"link", "cat" + at, "rate", "memferry", []string{"nbdcopy 4x64"}, Higher, 0.9},
			Goal{"link", "first byte" + at, "latency", "memferry", nil, Lower, ms + 5},
			Goal{"link", "4K during the pull" + at, "read p99", "memferry", nil, Lower, 1.5 * ms},
			Goal{"link", "4K during the pull" + at, "write p99", "memferry", nil, Lower, 1},
			Goal{"link", "push" + at, "rate", "memferry", []string{"nbdcopy 4x64"}, Higher, 0.8},
		)
		if ms >= 10 {
			out = append(out, Goal{"link", "cat" + at, "rate", "memferry", []string{"nbdfuse"}, Higher, 25})
		}
	}
	return out
}

func memoryGoals() []Goal {
	return []Goal{
		{"memory", "under load", "resident", "serve", nil, Lower, 64},
		{"memory", "under load", "resident", "mount", nil, Lower, 64},
		{"memory", "1 TiB sparse", "resident", "mount", nil, Lower, 100},
		{"memory", "1 TiB sparse", "ready", "mount", nil, Lower, 1000},
	}
}

func (g Goal) comparison() string {
	switch len(g.Against) {
	case 0:
		return g.Subject
	case 1:
		return g.Subject + " / " + g.Against[0]
	}
	return g.Subject + " / best of " + strings.Join(g.Against, ", ")
}

func (g Goal) bound() string {
	sign := "≥"
	if g.Better == Lower {
		sign = "≤"
	}
	if len(g.Against) == 0 {
		return sign + " " + figure(g.Bound)
	}
	return sign + " " + times(g.Bound)
}

func (v Verdict) measured() string {
	switch {
	case v.Missing != "":
		return v.Missing
	case len(v.Goal.Against) == 0:
		return figure(v.Measured)
	}
	return times(v.Measured)
}

func (v Verdict) word() string {
	switch {
	case v.Missing != "":
		return "not measured"
	case v.Met:
		return "met"
	}
	return "**missed**"
}

// times formats a ratio.
func times(f float64) string {
	if f < 0.1 {
		return fmt.Sprintf("%.3f×", f)
	}
	return fmt.Sprintf("%.2f×", f)
}

func figure(f float64) string {
	switch {
	case f >= 100:
		return fmt.Sprintf("%.0f", f)
	case f >= 10:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.3g", f)
}
