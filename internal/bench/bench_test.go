package bench

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	e.Report.WriteTables(&b, []Goal{
		{"g", "s", "rate", "us", []string{"slow"}, Higher, 1.5},
		{"g", "s", "rate", "broken", []string{"slow"}, Higher, 1.5},
		{"another", "s", "rate", "us", []string{"slow"}, Higher, 1.5},
	})
	for _, want := range []string{"### g\n", "1 of 2 goals met", "| s | rate | fast | 200 | MB/s | 5 |", "- s, broken: no luck\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in the tables:\n%s", want, b.String())
		}
	}
}

// TestFailureDropsEarlierRounds: a median of fewer rounds is none, and a goal
// of which nothing could be measured is told, not left out.
func TestFailureDropsEarlierRounds(t *testing.T) {
	e := &Env{Rounds: 5, Log: t.Output(), Report: &Report{}}
	runs := 0
	e.Compare(t.Context(), "g", "s", Subject{"us", func(context.Context) ([]Value, error) {
		if runs++; runs > 3 {
			return nil, errors.New("gone")
		}
		return []Value{{"rate", "MB/s", Higher, 1}}, nil
	}})
	if r := e.Report.Results(); len(r) != 0 {
		t.Errorf("kept %v", r)
	}
	v := e.Report.Judge([]Goal{{"g", "s", "rate", "us", nil, Higher, 1}})
	if len(v) != 1 || v[0].word() != "not measured" {
		t.Errorf("verdicts %v", v)
	}
}

// TestScenariosAreNarrowed: what the expression does not match is not run, not
// set up, not judged, and told to whoever asks what there is.
func TestScenariosAreNarrowed(t *testing.T) {
	e := &Env{Rounds: 5, Log: t.Output(), Report: &Report{}, only: regexp.MustCompile("^read at (1|10)ms$")}
	ran := map[string]int{}
	for _, scenario := range []string{"read at 1ms", "read at 10ms", "read at 100ms", "write at 1ms", "write at 1ms"} {
		e.Compare(t.Context(), "g", scenario, Subject{"us", func(context.Context) ([]Value, error) {
			ran[scenario]++
			return []Value{{"rate", "MB/s", Higher, 1}}, nil
		}})
	}
	if want := map[string]int{"read at 1ms": 6, "read at 10ms": 6}; !maps.Equal(ran, want) {
		t.Errorf("ran %v, want %v", ran, want)
	}
	if e.wants("write at 1ms", "read at 50ms") || !e.wants("write at 1ms", "read at 10ms") {
		t.Error("set up for nothing, or not set up")
	}
	if got, want := e.Skipped(), []string{"read at 100ms", "write at 1ms", "read at 50ms"}; !slices.Equal(got, want) {
		t.Errorf("left out %q, want %q", got, want)
	}
	if v := e.Report.Judge([]Goal{{"g", "write at 1ms", "rate", "us", nil, Higher, 1}}); len(v) != 0 {
		t.Errorf("judged what was left out: %v", v)
	}
	if e.Report.Empty() || !(&Report{}).Empty() {
		t.Error("a report that is not empty is, or the other way round")
	}
}

// TestGoalsNameScenarios: the names by which a group decides what to set up
// are those that are judged.
func TestGoalsNameScenarios(t *testing.T) {
	for group, run := range map[string]func(context.Context, *Env) error{"nbd": NBD, "link": Link, "fuse": FUSE, "uffd": UFFD} {
		e := &Env{Rounds: 1, Size: 1 << 20, Log: t.Output(), Report: &Report{}, only: regexp.MustCompile("no such scenario")}
		if err := run(t.Context(), e); err != nil {
			t.Errorf("%s: %v", group, err)
		}
		for _, g := range Goals() {
			if g.Group == group && !slices.Contains(e.Skipped(), g.Scenario) {
				t.Errorf("%s: %q is not among %q", group, g.Scenario, e.Skipped())
			}
		}
	}
}

func TestSplice(t *testing.T) {
	const doc = "a\n<!-- bench x -->\nold\n<!-- end x -->\nb\n"
	got, err := Splice(doc, "x", "\nnew\n")
	if want := "a\n<!-- bench x -->\n\nnew\n\n<!-- end x -->\nb\n"; err != nil || got != want {
		t.Errorf("got %q, error %v", got, err)
	}
	if again, err := Splice(got, "x", "new"); err != nil || again != got {
		t.Errorf("not the same the second time: %q, error %v", again, err)
	}
	if _, err := Splice(doc, "y", "new"); err == nil || !strings.Contains(err.Error(), "<!-- bench y -->") {
		t.Errorf("error %v", err)
	}
}

// TestNothingIsLeftMounted: closing the environment takes away what a step that
// was cut short left mounted.
func TestNothingIsLeftMounted(t *testing.T) {
	testenv.Root(t)
	e := &Env{dir: t.TempDir(), bin: t.TempDir()}
	at := filepath.Join(e.dir, "m1")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", at, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(e.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there", e.dir)
	}
}

// TestHungStepIsCut: a program that never ends is cut at the step's limit, with
// the child of its own that holds its output.
func TestHungStepIsCut(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	begin := time.Now()
	_, out, err := run(ctx, "sh", "-c", "sleep 60 & echo $!; sleep 60")
	if err == nil {
		t.Error("no error")
	}
	if took := time.Since(begin); took > 40*time.Second {
		t.Errorf("took %v", took)
	}
	child := strings.TrimSpace(string(out))
	for end := time.Now().Add(10 * time.Second); running(child); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the child %s is still there", child)
		}
	}
}

// running tells whether a process exists and is no zombie.
func running(pid string) bool {
	status, err := os.ReadFile("/proc/" + pid + "/status")
	return err == nil && !strings.Contains(string(status), "\nState:\tZ")
}
