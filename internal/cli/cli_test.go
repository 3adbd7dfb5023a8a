package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/region"
)

// lockedBuffer is a bytes.Buffer for several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestProgressLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lockedBuffer
		done := int64(1 << 20)
		stop := startProgress(progress{
			label: "pull", out: &out, interval: time.Second,
			sample: func() sample { return sample{done, 4 << 20, "fast"} },
		})
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		time.Sleep(time.Second) // nothing has changed, so no line
		synctest.Wait()
		done = 4 << 20
		stop()
		const want = "pull: 1 MiB of 4 MiB (25%), fast\npull: 4 MiB of 4 MiB (100%), fast\n"
		if got := out.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestProgressOfWhatEndsAtOnce(t *testing.T) {
	var out lockedBuffer
	startProgress(progress{out: &out, sample: func() sample { return sample{1, 2, ""} }})()
	if got := out.String(); got != "" {
		t.Errorf("got %q", got)
	}
}

func TestProgressBar(t *testing.T) {
	var out, log lockedBuffer
	sink := &logSink{w: &log}
	stop := startProgress(progress{
		label: "pull", out: &out, sink: sink, terminal: true,
		sample: func() sample { return sample{1 << 20, 4 << 20, "fast"} },
	})
	time.Sleep(2 * barInterval)
	stop()
	fmt.Fprint(sink, "after")
	// Seven of the 28 places between the brackets, the last of them the tip.
	if got := out.String(); !strings.Contains(got, "[======>"+strings.Repeat(" ", 21)+"]  1 MiB of 4 MiB (25%), fast") {
		t.Errorf("bar %q", got)
	}
	if log.String() != "after" {
		t.Errorf("the log has %q: the bar kept it", log.String())
	}
}

func TestMeter(t *testing.T) {
	var m meter
	now := time.Unix(0, 0)
	for i := range int64(100) {
		m.update(i*1000, now)
		now = now.Add(100 * time.Millisecond)
	}
	if r := m.update(100*1000, now); r < 9500 || r > 10500 {
		t.Errorf("rate %d, want about 10000", r)
	}
	for range 1000 {
		now = now.Add(100 * time.Millisecond)
		m.update(100*1000, now)
	}
	if m.value != 0 {
		t.Errorf("rate %g at rest", m.value)
	}
}

func TestMetrics(t *testing.T) {
	var log lockedBuffer
	stats := region.Stats{
		Size: 8192, Dirty: 4096, RTT: 20 * time.Millisecond, RemoteUp: true,
		Errors: []region.ErrorStat{{Kind: region.ErrorPush, Count: 3}},
	}
	m, err := startMetrics("127.0.0.1:0", slog.New(slog.NewTextHandler(&log, nil)), regionCollector(func() region.Stats { return stats }))
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get("http://" + m.addr.String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	res.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"memferry_region_size_bytes 8192\n",
		"memferry_region_dirty_bytes 4096\n",
		"memferry_region_rtt_seconds 0.02\n",
		"memferry_region_remote_up 1\n",
		`memferry_region_errors_total{kind="push"} 3` + "\n",
	} {
		if !strings.Contains(string(body), want) {
			t.Errorf("no %q", want)
		}
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if strings.Contains(log.String(), "level=WARN") {
		t.Errorf("a warning on loopback: %s", log.String())
	}
}

func TestMetricsBeyondLoopbackWarn(t *testing.T) {
	var log lockedBuffer
	m, err := startMetrics("0.0.0.0:0", slog.New(slog.NewTextHandler(&log, nil)), regionCollector(func() region.Stats { return region.Stats{} }))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("no warning: %s", log.String())
	}
}

func TestLine(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{errors.New("a: b"), "memferry: a: b"},
		{errors.Join(errors.New("a"), errors.New("b\nc")), "memferry: a; b; c"},
		{withRemedy(memferry.ErrInUse, "do %s", "this"), "memferry: in use; do this"},
		{fmt.Errorf("x: %w", memferry.ErrNoSpace), "memferry: x: no space left; free some space and try again"},
		{fmt.Errorf("x: %w; tidy up", memferry.ErrNoSpace), "memferry: x: no space left; tidy up"},
		{&usageError{"memferry mount", errors.New("what?")}, "memferry: what?; see `memferry mount --help`"},
	} {
		if got := line(tc.err); got != tc.want {
			t.Errorf("line(%v) = %q, want %q", tc.err, got, tc.want)
		}
	}
}

// TestBecause: what the line around it says already is not said again, and
// nothing else is lost.
func TestBecause(t *testing.T) {
	u := &region.UnpushedError{Bytes: 4096, Err: errors.New("no answer")}
	for want, err := range map[string]error{
		"":                       nil,
		": no answer":            u,
		": no answer; disk full": errors.Join(u, errors.New("disk full")),
		": push: no answer":      fmt.Errorf("push: %w", u),
		": disk full":            errors.New("disk full"),
	} {
		if got := because(err); got != want {
			t.Errorf("because(%v) = %q, want %q", err, got, want)
		}
	}
}

func TestSplitExport(t *testing.T) {
	for _, tc := range [][3]string{
		{"disk=/srv/a", "disk", "/srv/a"},
		{"disk=mem:?size=1G", "disk", "mem:?size=1G"},
		{"mem:?size=1G", "", "mem:?size=1G"},
		{"./a=b", "", "./a=b"},
		{"/a=b", "", "/a=b"},
		{"=x", "", "=x"},
		{"plain", "", "plain"},
	} {
		name, url := splitExport(tc[0])
		if name != tc[1] || url != tc[2] {
			t.Errorf("splitExport(%q) = %q, %q", tc[0], name, url)
		}
	}
}

func TestDemoData(t *testing.T) {
	d := demoData{size: 5 * demoBlock, writes: map[int64]demoWrite{}}
	before := d.sum()
	image := make([]byte, d.size)
	_ = d.each(func(p []byte, off int64) error { copy(image[off:], p); return nil })
	// Within a block, at its edges, and across two.
	for i, off := range []int64{0, demoBlock - 4096, 2*demoBlock - 100, d.size - 4096} {
		w := demoWrite{4096, uint64(i)}
		d.writes[off] = w
		copy(image[off:], w.bytes())
	}
	got, err := sumOf(bytes.NewReader(image), d.size)
	if err != nil || got != d.sum() || got == before {
		t.Errorf("sum %x of the image, %x of the data, %x before; %v", got, d.sum(), before, err)
	}
}

// TestMainInProcess runs commands with streams of their own.
func TestMainInProcess(t *testing.T) {
	var out, errs bytes.Buffer
	env := Env{Args: []string{"version"}, Stdout: &out, Stderr: &errs}
	if status := Main(env); status != exitOK || !strings.HasPrefix(out.String(), "memferry ") || errs.Len() > 0 {
		t.Errorf("version: %d, %q, %q", status, out.String(), errs.String())
	}
	env.Args = []string{"info"}
	if status := Main(env); status != exitUsage || !strings.Contains(errs.String(), "--help") {
		t.Errorf("info: %d, %q", status, errs.String())
	}
	if status := Main(Env{Args: []string{"info", "/nowhere"}}); status != exitFailed {
		t.Errorf("info /nowhere: %d", status)
	}
}

func TestAbout(t *testing.T) {
	if err := about("x", nil); err != nil {
		t.Error(err)
	}
	if err := about("/a", errors.New("open /a: no")); err.Error() != "open /a: no" {
		t.Error(err)
	}
	if err := about("/a", context.Canceled); err.Error() != "/a: context canceled" || !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestServerThatIsNotNBD(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "220 mail.example.org ESMTP ready, speak first\r\n")
			c.Close()
		}
	}()
	defer func() { l.Close(); <-done }()
	for _, args := range [][]string{
		{"ls", "nbd://" + l.Addr().String()},
		{"mount", "--io-timeout", "2s", "nbd://" + l.Addr().String() + "/x", t.TempDir() + "/m"},
	} {
		var errs bytes.Buffer
		status := Main(Env{Args: args, Stderr: &errs})
		if status != exitFailed || strings.Count(errs.String(), "\n") != 1 || !strings.Contains(errs.String(), "not an NBD server") {
			t.Errorf("%v: %d, %q", args, status, errs.String())
		}
	}
}
