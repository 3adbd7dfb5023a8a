package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"github.com/memferry/memferry/internal/netsim"
)

const (
	ours, inProcess  = "memferry", "memferry, in process"
	pulling, trimmed = "memferry, pulling", "memferry, 4K pages"
	mapper           = "userfaultfd-go"
)

// The scenarios of memory, but for those behind links.
const (
	firstTouch  = "first touch in order"
	randomFault = "random fault"
	firstWrite  = "first write to an armed page"
	writerSlow  = "flat-out writer, 10 scans/s"
)

// uffdRTTs are the round trips behind which memory is compared.
var uffdRTTs = []time.Duration{10 * time.Millisecond, 50 * time.Millisecond}

// dirtyParts are how many pages in a thousand are written between two scans.
var dirtyParts = []int{1, 10, 100}

func dirtyScenario(perMille int) string {
	return fmt.Sprintf("find writes, %s %% dirty", strconv.FormatFloat(float64(perMille)/10, 'f', -1, 64))
}

func farScenario(rtt time.Duration) string { return fmt.Sprintf("first touch at %v", rtt) }

// memory is what the scenarios of a group of memory run.
type memory struct {
	e     *Env
	touch string // the program that uses our memory
	peer  string // that of userfaultfd-go
	hash  string
	err   map[string]error // why a peer can't be built, by its path
	size  int64
	small string // the data's first part, for what is behind links
}

// UFFD compares memory behind userfaultfd (frontend/uffd).
func UFFD(ctx context.Context, e *Env) error {
	m := &memory{e: e, err: make(map[string]error)}
	m.size = min(e.Size, linkSize)
	if e.wants(uffdScenarios()...) {
		if err := m.prepare(ctx); err != nil {
			return err
		}
	}
	m.local(ctx)
	for _, rtt := range uffdRTTs {
		if err := m.far(ctx, rtt); err != nil {
			return err
		}
	}
	m.writes(ctx)
	return m.sensitivity(ctx)
}

// uffdScenarios returns all names.
func uffdScenarios() []string {
	out := []string{firstTouch, randomFault, firstWrite, writerSlow}
	for _, rtt := range uffdRTTs {
		out = append(out, farScenario(rtt))
	}
	for _, n := range dirtyParts {
		out = append(out, dirtyScenario(n))
	}
	for _, p := range sensitivityPoints() {
		out = append(out, p.scenario())
	}
	return out
}

func (m *memory) prepare(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, buildLimit)
	defer cancel()
	e := m.e
	m.touch = filepath.Join(e.bin, "touch")
	if err := goBuild(ctx, "", m.touch, "github.com/memferry/memferry/internal/bench/touch", "CGO_ENABLED=0"); err != nil {
		return err
	}
	m.peer, m.hash = filepath.Join(e.bin, "userfaultfdgo"), filepath.Join(e.bin, "xxh3")
	// They are missing from the tables where they can't be built.
	m.err[m.peer] = e.buildPeer(ctx, "userfaultfdgo", m.peer, "CGO_ENABLED=1")
	m.err[m.hash] = e.buildPeer(ctx, "xxh3", m.hash, "CGO_ENABLED=0")
	m.small = filepath.Join(e.dir, "far")
	return e.truncatedCopy(m.small, m.size)
}

// values runs a program that prints its measurements.
func (m *memory) values(ctx context.Context, program string, args ...string) ([]Value, error) {
	if err := m.err[program]; err != nil {
		return nil, err
	}
	_, out, err := run(ctx, program, args...)
	if err != nil {
		return nil, err
	}
	var v []Value
	if err := json.Unmarshal(out, &v); err != nil {
		return nil, fmt.Errorf("output of %s: %w: %s", program, err, out)
	}
	return v, nil
}

// our makes a subject of touch.
func (m *memory) our(name string, args ...string) Subject {
	return Subject{name, func(ctx context.Context) ([]Value, error) { return m.values(ctx, m.touch, args...) }}
}

// their makes a subject of userfaultfd-go. Its handler ends at the first fault
// that a signal interrupts, and never gets to run again once a garbage
// collection waits for who faults: it is spared both.
func (m *memory) their(args ...string) Subject {
	return Subject{mapper, func(ctx context.Context) ([]Value, error) {
		if err := m.err[m.peer]; err != nil {
			return nil, err
		}
		return m.values(ctx, "env", append([]string{"GODEBUG=asyncpreemptoff=1", "GOGC=off", m.peer}, args...)...)
	}}
}

// local compares memory whose source is memory of this machine: to us a file
// in tmpfs that the helper reads, to userfaultfd-go bytes of its own.
func (m *memory) local(ctx context.Context) {
	url := "--url=file:" + m.e.data
	m.e.Compare(ctx, "uffd", firstTouch,
		m.our(ours, url, "--pull=demand", "first-touch"),
		m.our(pulling, url, "--pull=full", "first-touch"),
		m.our(trimmed, url, "--pull=full", "--small", "first-touch"),
		m.our(inProcess, url, "--pull=full", "--in-process", "first-touch"),
		m.our("plain write", "--url="+m.e.data, "plain-write"),
		m.their("--file="+m.e.data))
	m.e.Compare(ctx, "uffd", randomFault,
		m.our(ours, url, "--pull=demand", "random"),
		m.our(trimmed, url, "--pull=demand", "--small", "random"),
		m.our("memferry, 4K pages, one at a time", url, "--pull=none", "--small", "random"),
		m.their("--file="+m.e.data, "--random=65536"))
}

// far compares memory behind a delay. userfaultfd-go brings a page a round
// trip, so what it does in a few seconds tells its rate.
func (m *memory) far(ctx context.Context, rtt time.Duration) error {
	scenario := farScenario(rtt)
	if !m.e.wants(scenario) {
		return nil
	}
	s, err := m.e.behind(ctx, netsim.Link{RTT: rtt}, m.small)
	if err != nil {
		return err
	}
	defer s.stop()
	url := "--url=" + s.uri("d")
	pages := max(8, int(2*time.Second/rtt))
	m.e.Compare(ctx, "uffd", scenario,
		Subject{ours, func(ctx context.Context) ([]Value, error) {
			var all []Value
			for _, what := range []string{"first-touch", "first-byte", "during"} {
				v, err := m.values(ctx, m.touch, url, what)
				if err != nil {
					return nil, err
				}
				all = append(all, v...)
			}
			return all, nil
		}},
		m.their("--file="+m.small, "--rtt="+rtt.String(), "--size="+strconv.Itoa(pages*4096)))
	return ctx.Err()
}

// writes compares finding what was written.
func (m *memory) writes(ctx context.Context) {
	url := "--url=file:" + m.e.data
	for _, n := range dirtyParts {
		m.e.Compare(ctx, "uffd", dirtyScenario(n),
			m.our(ours, url, "--part="+strconv.FormatFloat(float64(n)/1000, 'f', -1, 64), "detect"),
			Subject{"xxh3", func(ctx context.Context) ([]Value, error) { return m.values(ctx, m.hash, "--file="+m.e.data) }})
	}
	m.e.Compare(ctx, "uffd", firstWrite, m.our(ours, url, "first-write"))
	m.e.Compare(ctx, "uffd", writerSlow, m.our(ours, url, "writer"))
}

func uffdGoals() []Goal {
	out := []Goal{
		{"uffd", firstTouch, "rate", ours, []string{mapper}, Higher, 12},
		{"uffd", firstTouch, "rate", pulling, []string{mapper}, Higher, 25},
		{"uffd", firstTouch, "rate", pulling, []string{"plain write"}, Higher, 0.5},
		{"uffd", randomFault, "p50", ours, []string{mapper}, Lower, 1.1},
		{"uffd", randomFault, "p99", ours, []string{mapper}, Lower, 1},
	}
	for i, rtt := range uffdRTTs {
		s, ms := farScenario(rtt), float64(rtt.Milliseconds())
		out = append(out,
			Goal{"uffd", s, "rate", ours, []string{mapper}, Higher, []float64{2000, 5000}[i]},
			Goal{"uffd", s, "first byte", ours, nil, Lower, ms + 5},
			Goal{"uffd", s, "fault p99", ours, nil, Lower, 1.5 * ms})
	}
	return append(out,
		Goal{"uffd", dirtyScenario(1), "time", ours, []string{"xxh3"}, Lower, 1.0 / 30},
		Goal{"uffd", dirtyScenario(10), "time", ours, []string{"xxh3"}, Lower, 1.0 / 30},
		Goal{"uffd", firstWrite, "p50", ours, nil, Lower, 1.5},
		Goal{"uffd", writerSlow, "speed kept, 64 MiB", ours, nil, Higher, 0.9},
		Goal{"uffd", writerSlow, "speed kept, all of it", ours, nil, Higher, 0.9})
}
