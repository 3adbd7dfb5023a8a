// Package bench measures memferry beside the programs that people use today:
// every subject of a comparison runs in the same run, on the same machine, in
// turn, and what counts is the ratio of medians. cmd is the program behind
// "make bench".
package bench

import (
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"slices"
	"time"
)

// Better says which way a metric improves.
type Better string

// The two ways.
const (
	Higher Better = "higher"
	Lower  Better = "lower"
)

// Value is one measurement.
type Value struct {
	Metric string
	Unit   string
	Better Better
	X      float64
}

// Result is what is known of one metric of one subject: the one schema that
// everything here prints.
type Result struct {
	Group    string    `json:"group"`    // nbd, fuse, link, direct, memory, uffd
	Scenario string    `json:"scenario"` // what was done
	Metric   string    `json:"metric"`
	Unit     string    `json:"unit"`
	Better   Better    `json:"better"`
	Subject  string    `json:"subject"` // who did it
	Samples  []float64 `json:"samples"`
	Median   float64   `json:"median"`
}

// Subject takes part in a comparison.
type Subject struct {
	Name string
	Run  func(ctx context.Context) ([]Value, error)
}

// Report collects results in the order in which they came up.
type Report struct {
	results  []*Result
	failures []failure
}

// failure is something that could not be measured.
type failure struct {
	group, scenario, subject string
	err                      error
}

// Results returns all results, with their medians.
func (r *Report) Results() []Result {
	out := make([]Result, 0, len(r.results))
	for _, x := range r.results {
		y := *x
		y.Median = Median(y.Samples)
		out = append(out, y)
	}
	return out
}

// Empty reports whether nothing was measured, nor should have been.
func (r *Report) Empty() bool { return len(r.results) == 0 && len(r.failures) == 0 }

// Fail records that something could not be measured.
func (r *Report) Fail(group, scenario, subject string, err error) {
	r.failures = append(r.failures, failure{group, scenario, subject, err})
}

func (r *Report) add(group, scenario, subject string, v Value) {
	for _, x := range r.results {
		if x.Group == group && x.Scenario == scenario && x.Subject == subject && x.Metric == v.Metric {
			x.Samples = append(x.Samples, v.X)
			return
		}
	}
	r.results = append(r.results, &Result{
		Group: group, Scenario: scenario, Subject: subject,
		Metric: v.Metric, Unit: v.Unit, Better: v.Better, Samples: []float64{v.X},
	})
}

// find returns the median of one result.
func (r *Report) find(group, scenario, metric, subject string) (float64, bool) {
	for _, x := range r.results {
		if x.Group == group && x.Scenario == scenario && x.Metric == metric && x.Subject == subject {
			return Median(x.Samples), true
		}
	}
	return 0, false
}

// WriteJSON writes one result a line.
func (r *Report) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	for _, x := range r.Results() {
		if err := enc.Encode(x); err != nil {
			return err
		}
	}
	return nil
}

// Median returns the middle of the samples, or the mean of the middle two.
func Median(samples []float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(samples))
	m := len(s) / 2
	if len(s)%2 == 1 {
		return s[m]
	}
	return (s[m-1] + s[m]) / 2
}

// Percentile returns the smallest sample that at least p percent do not exceed.
func Percentile(samples []float64, p float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(samples))
	i := int(float64(len(s))*p/100+0.999999) - 1
	return s[min(max(i, 0), len(s)-1)]
}

// Compare runs the subjects once to warm up and then Rounds times, in a new
// random order each time, and records what they measure. A machine whose speed
// drifts is then as unfair to one as to another. A subject that fails is
// reported and left out: what it measured before is dropped, for a median of
// fewer rounds than the others' would not be told from theirs. A scenario that
// Options.Scenario leaves out is not run.
func (e *Env) Compare(ctx context.Context, group, scenario string, subjects ...Subject) {
	if !e.wants(scenario) {
		return
	}
	measured := make([][]Value, len(subjects))
	failed := make([]bool, len(subjects))
	for round := range e.Rounds + 1 {
		for _, i := range rand.Perm(len(subjects)) {
			s := subjects[i]
			if failed[i] || ctx.Err() != nil || round == 0 && e.Rounds == 1 {
				continue
			}
			e.logf("%s, %s: %s, round %d of %d", group, scenario, s.Name, round, e.Rounds)
			one, cancel := context.WithTimeout(ctx, runLimit)
			values, err := s.Run(one)
			cancel()
			if err != nil {
				failed[i], measured[i] = true, nil
				e.Report.Fail(group, scenario, s.Name, err)
				e.logf("%s, %s: %s: %v", group, scenario, s.Name, err)
				continue
			}
			if round > 0 {
				measured[i] = append(measured[i], values...)
			}
		}
	}
	for i, s := range subjects {
		for _, v := range measured[i] {
			e.Report.add(group, scenario, s.Name, v)
		}
	}
}

// runLimit bounds one run of one subject.
const runLimit = 2 * time.Minute
