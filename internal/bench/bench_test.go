package bench

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestMedianAndPercentile(t *testing.T) {
	for _, c := range []struct {
		samples []float64
		median  float64
		p99     float64
	}{
		{nil, 0, 0},
		{[]float64{3}, 3, 3},
		{[]float64{5, 1, 3}, 3, 5},
		{[]float64{4, 1, 3, 2}, 2.5, 4},
	} {
		if got := Median(c.samples); got != c.median {
			t.Errorf("Median(%v) = %v, want %v", c.samples, got, c.median)
		}
		if got := Percentile(c.samples, 99); got != c.p99 {
			t.Errorf("Percentile(%v, 99) = %v, want %v", c.samples, got, c.p99)
		}
	}
	var hundred []float64
	for i := range 100 {
		hundred = append(hundred, float64(i+1))
	}
	if got := Percentile(hundred, 99); got != 99 {
		t.Errorf("the 99th percentile of 1..100 is %v", got)
	}
}

func TestCompareAndJudge(t *testing.T) {
	e := &Env{Rounds: 5, Log: t.Output(), Report: &Report{}}
	constant := func(x float64) func(context.Context) ([]Value, error) {
		return func(context.Context) ([]Value, error) { return []Value{{"rate", "MB/s", Higher, x}}, nil }
	}
	calls := 0
	e.Compare(t.Context(), "g", "s",
		Subject{"us", constant(300)}, Subject{"slow", constant(100)}, Subject{"fast", constant(200)},
		Subject{"broken", func(context.Context) ([]Value, error) { calls++; return nil, errors.New("no luck") }})
	if calls != 1 {
		t.Errorf("a subject that fails was run %d times", calls)
	}
	verdicts := e.Report.Judge([]Goal{
		{"g", "s", "rate", "us", []string{"slow", "fast", "broken"}, Higher, 1.5},
		{"g", "s", "rate", "us", []string{"fast"}, Higher, 1.6},
		{"g", "s", "rate", "us", []string{"slow", "fast"}, Lower, 3},
		{"g", "s", "rate", "us", nil, Lower, 299},
		{"g", "s", "rate", "us", []string{"broken"}, Higher, 1},
		{"g", "not run", "rate", "us", nil, Higher, 1},
	})
	var got []string
	for _, v := range verdicts {
		got = append(got, v.measured()+" "+v.word())
	}
	want := "1.50× met; 1.50× **missed**; 3.00× met; 300 **missed**; no figure of broken not measured"
	if s := strings.Join(got, "; "); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
	var b strings.Builder
	e.Report.WriteTables(&b, verdicts)
	if !strings.Contains(b.String(), "| s | rate | fast | 200 | MB/s | 5 |") || !strings.Contains(b.String(), "no luck") {
		t.Errorf("tables:\n%s", b.String())
	}
}
