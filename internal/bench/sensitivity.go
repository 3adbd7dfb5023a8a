package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/memferry/memferry/internal/netsim"
)

// point is one link.
type point struct {
	name      string // of the bandwidth
	bandwidth int64  // bytes per second; 0: unlimited
	size      int64  // what is moved: enough for the link to be full for a second
	rtt       time.Duration
}

func (p point) scenario() string { return fmt.Sprintf("over %s at %v", p.name, p.rtt) }

// sensitivityPoints returns all links, one bandwidth after the other.
func sensitivityPoints() []point {
	var out []point
	for _, b := range []point{
		{"100 Mbit/s", 100e6 / 8, 24 << 20, 0},
		{"1 Gbit/s", 1e9 / 8, 192 << 20, 0},
		{"unlimited", 0, linkSize, 0},
	} {
		for _, ms := range []int{0, 1, 10, 50, 100} {
			b.rtt = time.Duration(ms) * time.Millisecond
			out = append(out, b)
		}
	}
	return out
}

// sensitivity measures how throughput and latency follow the link.
func (m *memory) sensitivity(ctx context.Context) error {
	for _, p := range sensitivityPoints() {
		if err := m.sensitivityAt(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

func (m *memory) sensitivityAt(ctx context.Context, p point) error {
	if !m.e.wants(p.scenario()) {
		return nil
	}
	path := filepath.Join(m.e.dir, "part")
	if err := m.e.truncatedCopy(path, min(p.size, m.size)); err != nil {
		return err
	}
	s, err := m.e.behind(ctx, netsim.Link{RTT: p.rtt, Bandwidth: p.bandwidth}, path)
	if err != nil {
		return err
	}
	defer s.stop()
	url := "--url=" + s.uri("d")
	m.e.Compare(ctx, "uffd", p.scenario(), Subject{ours, func(ctx context.Context) ([]Value, error) {
		values, err := m.values(ctx, m.touch, url, "first-touch")
		if err != nil {
			return nil, err
		}
		alone, err := m.values(ctx, m.touch, url, "--pull=demand", "first-byte")
		return append(only(values, "rate"), alone...), err
	}})
	return ctx.Err()
}

// writeSensitivity writes what was measured of links as CSV; it reports whether
// there was anything.
func (r *Report) writeSensitivity(w io.Writer) (bool, error) {
	found := false
	for _, p := range sensitivityPoints() {
		rate, ok1 := r.find("uffd", p.scenario(), "rate", ours)
		first, ok2 := r.find("uffd", p.scenario(), "first byte", ours)
		if !ok1 || !ok2 {
			continue
		}
		if !found {
			if _, err := fmt.Fprintln(w, "bandwidth,rtt_ms,rate_mb_s,fault_ms"); err != nil {
				return false, err
			}
			found = true
		}
		if _, err := fmt.Fprintf(w, "%s,%d,%.1f,%.3f\n", p.name, p.rtt.Milliseconds(), rate, first); err != nil {
			return false, err
		}
	}
	return found, nil
}

// Sensitivity writes uffd-links.csv and draws uffd-links.svg in a directory, if
// links were measured.
func (e *Env) Sensitivity(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(dir, "uffd-links.csv")
	f, err := os.CreateTemp(dir, ".uffd-links")
	if err != nil {
		return err
	}
	found, err := e.Report.writeSensitivity(f)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err != nil || !found {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	plot := filepath.Join(e.bin, "plot")
	if err := e.buildPeer(ctx, "plot", plot, "CGO_ENABLED=0"); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, plot, path, filepath.Join(dir, "uffd-links.svg")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("draw %s: %w: %s", strconv.Quote(path), err, out)
	}
	return nil
}
