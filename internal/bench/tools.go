package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// fioResult is the part of fio's JSON that is used here.
type fioResult struct {
	Jobs []struct {
		Error int `json:"error"`
		Read  struct {
			IOPS      float64 `json:"iops"`
			Bandwidth float64 `json:"bw_bytes"`
			Latency   struct {
				Percentile map[string]float64 `json:"percentile"`
			} `json:"clat_ns"`
		} `json:"read"`
	} `json:"jobs"`
}

// fio runs one timed read job and returns its rate, operations and median
// latency.
func (e *Env) fio(ctx context.Context, args ...string) ([]Value, error) {
	args = append([]string{
		"--name=bench", "--time_based", "--runtime=" + strconv.Itoa(e.Seconds), "--ramp_time=1",
		"--output-format=json", "--randrepeat=0", "--norandommap", "--size=" + strconv.FormatInt(e.Size, 10),
	}, args...)
	_, out, err := run(ctx, "fio", args...)
	if err != nil {
		return nil, err
	}
	// fio may print a note before the JSON.
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	var r fioResult
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("fio's output: %w", err)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		return nil, fmt.Errorf("fio reports an error: %s", out)
	}
	read := r.Jobs[0].Read
	return []Value{
		{"rate", "MB/s", Higher, read.Bandwidth / 1e6},
		{"IOPS", "1/s", Higher, read.IOPS},
		{"p50", "us", Lower, read.Latency.Percentile["50.000000"] / 1e3},
		{"p99", "us", Lower, read.Latency.Percentile["99.000000"] / 1e3},
	}, nil
}

// only keeps some metrics.
func only(values []Value, metrics ...string) []Value {
	var out []Value
	for _, m := range metrics {
		for _, v := range values {
			if v.Metric == m {
				out = append(out, v)
			}
		}
	}
	return out
}

// forget drops a file from the page cache.
func forget(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// catBuffer is what cat(1) reads at once.
const catBuffer = 128 << 10

// cat reads the first n bytes of a file as cat(1) does, and returns how long
// the whole and the first read took, the open included.
func cat(path string, n int64) (whole, first time.Duration, err error) {
	begin := time.Now()
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	buf := make([]byte, catBuffer)
	var got int64
	for got < n {
		m, err := f.Read(buf)
		if got == 0 {
			first = time.Since(begin)
		}
		got += int64(m)
		if err == io.EOF && got >= n { //nolint:errorlint // os.File returns it as it is
			break
		}
		if err != nil {
			return 0, 0, fmt.Errorf("read %s at %d: %w", path, got, err)
		}
	}
	return time.Since(begin), first, nil
}

// terseReadBandwidth returns the read bandwidth in KiB/s, the seventh field of
// fio's terse output (fio(1), TERSE OUTPUT).
func terseReadBandwidth(out []byte) (float64, error) {
	fields := strings.Split(strings.TrimSpace(string(out)), ";")
	if len(fields) < 7 {
		return 0, fmt.Errorf("fio's terse output: %q", out)
	}
	return strconv.ParseFloat(fields[6], 64)
}
