package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/file"
	"github.com/memferry/memferry/internal/lifecycle"
	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/nbd"
	"github.com/memferry/memferry/region"
)

const demoLong = `Show what memferry does, in less than a minute, on this machine alone.

A file of generated data is served behind a simulated link with a round trip of
20 ms. It is mounted twice: managed, with a local side, and direct, without. An
application then opens it, reads at random while the pull runs, reads all of
it, and writes; what it wrote is pushed, and a checksum proves that the source
has it. A table compares the two.

Where FUSE can't be used, the same is shown through the library. Everything is
in a temporary directory, which is removed at the end.`

type demoFlags struct {
	size size.Bytes
	rtt  time.Duration
}

// What the demonstration's application does.
const (
	demoReads       = 200
	demoWrites      = 500
	demoDirectReads = 50
	demoDirectWrite = 50
	demoIO          = 4 << 10
	// demoPatience bounds reading the whole of a direct mount; the rest is
	// extrapolated.
	demoPatience = 8 * time.Second
)

func (a *app) demoCmd() *cobra.Command {
	f := demoFlags{size: 256 << 20, rtt: 20 * time.Millisecond}
	cmd := &cobra.Command{
		Use:     "demo",
		Short:   "Show what memferry does, on this machine alone",
		Long:    demoLong,
		Example: "  memferry demo\n  memferry demo --rtt 100ms --size 64M",
		Args:    positional(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.size < demoBlock || f.size > 16<<30 || f.size%demoBlock != 0 {
				return usage(cmd, "--size %v: want whole MiB from 1 MiB to 16 GiB", f.size)
			}
			if f.rtt < 0 || f.rtt > 2*time.Second {
				return usage(cmd, "--rtt %v: want 0 to 2s", f.rtt)
			}
			if !cmd.Flags().Changed("log-level") && !a.logs.verbose {
				a.logs.level.value = "warn"
				a.log = a.logs.logger(a.sink)
			}
			if err := a.demo(cmd.Context(), f); err != nil {
				return fmt.Errorf("demo: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().Var(&f.size, "size", "size of the file")
	cmd.Flags().DurationVar(&f.rtt, "rtt", f.rtt, "round trip of the simulated link")
	return cmd
}

// demo is one run of the demonstration.
type demo struct {
	*app
	demoFlags
	dir    string // temporary
	source string // path of the file that is served
	url    string // where it is served, behind the link
	data   demoData
	fuse   bool
	rng    *rand.Rand
}

// demoResult is a column of the table at the end.
type demoResult struct {
	open, first            time.Duration
	readP50, readP99       time.Duration
	writeP50, writeP99     time.Duration
	whole                  time.Duration
	wholeBytes             int64
	flush                  time.Duration
	flushed                int64
	localBefore, localWhen float64 // percent, while the random reads ran
	proved                 bool
}

func (a *app) demo(ctx context.Context, f demoFlags) (err error) {
	var stack lifecycle.Stack
	defer func() { err = errors.Join(err, stack.Close(a.sig.Hard())) }()
	d := &demo{app: a, demoFlags: f, rng: rand.New(rand.NewPCG(1, 2))}
	if d.dir, err = os.MkdirTemp("", "memferry-demo-"); err != nil {
		return err
	}
	if err := stack.PushCloser("temporary directory", func() error { return os.RemoveAll(d.dir) }); err != nil {
		return err
	}
	d.say("memferry demo: %v behind a simulated link with a round trip of %v", f.size, f.rtt)
	if err := d.generate(ctx); err != nil {
		return err
	}
	if err := d.serveSource(&stack); err != nil {
		return err
	}
	d.fuse = true
	if why := fuseMissing(); why != "" {
		d.fuse = false
		d.say("\n%s\nSo there is no mount; the same is shown through the library.", why)
	}
	managed, err := d.show(ctx, false)
	if err != nil {
		return fmt.Errorf("managed: %w", err)
	}
	direct, err := d.show(ctx, true)
	if err != nil {
		return fmt.Errorf("direct: %w", err)
	}
	return d.summary(managed, direct)
}

func (d *demo) say(format string, v ...any) { fmt.Fprintf(d.env.Stdout, format+"\n", v...) }

// fuseMissing tells why FUSE can't be used here, "" if it can.
func fuseMissing() string {
	for _, f := range []finding{checkFUSE(), checkFusermount()} {
		if f.Needed && !f.OK {
			return fmt.Sprintf("%s: %s; %s.", f.Feature, f.Detail, f.Remedy)
		}
	}
	return ""
}

// generate makes the source.
func (d *demo) generate(ctx context.Context) error {
	start := time.Now()
	d.data = demoData{size: int64(d.size), writes: map[int64]demoWrite{}}
	d.source = filepath.Join(d.dir, "source.img")
	f, err := os.OpenFile(d.source, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = d.data.each(func(p []byte, off int64) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		_, err := f.WriteAt(p, off)
		return err
	})
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	d.say("  made the source's data in %s", durationText(time.Since(start)))
	return nil
}

// serveSource starts an NBD server and the link in front of it.
func (d *demo) serveSource(stack *lifecycle.Stack) error {
	b, err := file.Open(d.source, file.Options{})
	if err != nil {
		return err
	}
	if err := stack.PushCloser("source", b.Close); err != nil {
		return err
	}
	server := nbd.NewServer(nbd.ServerOptions{Logger: d.log})
	if err := server.Add(nbd.Export{Name: "disk", Backend: b}); err != nil {
		return err
	}
	near, far := filepath.Join(d.dir, "near"), filepath.Join(d.dir, "far")
	l, err := listenUnix(far)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), l) }()
	err = stack.PushCloser("server", func() error { return errors.Join(server.Close(), <-served) })
	if err != nil {
		return err
	}
	p, err := netsim.Listen(context.Background(), netsim.UNIX(near), netsim.UNIX(far), netsim.Link{RTT: d.rtt})
	if err != nil {
		return err
	}
	d.url = "nbd+unix:///disk?socket=" + url.QueryEscape(near)
	return stack.PushCloser("link", p.Close)
}

// subject is how the demonstration's application reaches the bytes.
type subject interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	// local is how much is local, in percent.
	local() float64
	// finish pushes what is dirty, tells how much, and ends everything.
	finish(ctx context.Context) (pushed int64, err error)
	// abandon ends everything after a failure.
	abandon()
}

// show runs the application once.
func (d *demo) show(ctx context.Context, direct bool) (r demoResult, err error) {
	kind := map[bool]string{false: "managed", true: "direct"}[direct]
	d.say("\n%s mount", kind)
	start := time.Now()
	s, err := d.openSubject(ctx, direct)
	if err != nil {
		return r, err
	}
	open := true
	defer func() {
		if open {
			s.abandon()
		}
	}()
	r.open = time.Since(start)
	d.say("  opened                    %s", durationText(r.open))
	steps := []func(context.Context, subject, bool, *demoResult) error{d.first, d.random, d.write, d.whole}
	for _, step := range steps {
		if ctx.Err() != nil {
			return r, context.Cause(ctx)
		}
		if err := step(ctx, s, direct, &r); err != nil {
			return r, err
		}
	}
	start = time.Now()
	open = false
	if r.flushed, err = s.finish(ctx); err != nil {
		return r, err
	}
	r.flush = time.Since(start)
	if direct {
		d.say("  unmounted                 %s", durationText(r.flush))
	} else {
		d.say("  flushed and unmounted     %s, %s pushed", durationText(r.flush), size.Format(r.flushed))
	}
	return r, d.prove(&r)
}

func (d *demo) first(_ context.Context, s subject, _ bool, r *demoResult) error {
	start := time.Now()
	// The second half of the file, where the pull comes last.
	if err := d.readCheck(s, d.data.size/2, demoIO); err != nil {
		return err
	}
	r.first = time.Since(start)
	d.say("  first byte                %s", durationText(r.first))
	return nil
}

// readCheck reads n bytes at off and compares them with what they should be.
func (d *demo) readCheck(s subject, off int64, n int) error {
	p := make([]byte, n)
	if _, err := s.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read at %d: %w", off, err)
	}
	block := make([]byte, demoBlock)
	base := off / demoBlock * demoBlock
	d.data.fill(block, base)
	if string(p) != string(block[off-base:off-base+int64(n)]) {
		return fmt.Errorf("read at %d: wrong bytes: %w", off, memferry.ErrCorrupt)
	}
	return nil
}

func (d *demo) randomOffset() int64 {
	return d.rng.Int64N(d.data.size/demoIO) * demoIO
}

func (d *demo) random(ctx context.Context, s subject, direct bool, r *demoResult) error {
	n := demoReads
	if direct {
		n = demoDirectReads
	}
	r.localBefore = s.local()
	took := make([]time.Duration, 0, n)
	p := make([]byte, demoIO)
	for range n {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		off := d.randomOffset()
		start := time.Now()
		if _, err := s.ReadAt(p, off); err != nil {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		took = append(took, time.Since(start))
	}
	r.localWhen = s.local()
	sortDurations(took)
	r.readP50, r.readP99 = quantile(took, 0.5), quantile(took, 0.99)
	during := ""
	if !direct {
		during = fmt.Sprintf(", while %.0f%% to %.0f%% was local", r.localBefore, r.localWhen)
	}
	d.say("  %3d random reads of 4 KiB p50 %s, p99 %s%s", n, durationText(r.readP50), durationText(r.readP99), during)
	return nil
}

func (d *demo) write(ctx context.Context, s subject, direct bool, r *demoResult) error {
	n := demoWrites
	if direct {
		n = demoDirectWrite
	}
	took := make([]time.Duration, 0, n)
	for range n {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		off, w := d.randomOffset(), demoWrite{demoIO, d.rng.Uint64()}
		p := w.bytes()
		start := time.Now()
		if _, err := s.WriteAt(p, off); err != nil {
			return fmt.Errorf("write at %d: %w", off, err)
		}
		if err := s.Sync(); err != nil {
			return fmt.Errorf("fsync: %w", err)
		}
		took = append(took, time.Since(start))
		d.data.writes[off] = w
	}
	sortDurations(took)
	r.writeP50, r.writeP99 = quantile(took, 0.5), quantile(took, 0.99)
	d.say("  %3d writes with fsync     p50 %s, p99 %s", n, durationText(r.writeP50), durationText(r.writeP99))
	return nil
}

// whole reads everything in order, and compares.
func (d *demo) whole(ctx context.Context, s subject, _ bool, r *demoResult) error {
	const step = 4 << 20
	p := make([]byte, step)
	start := time.Now()
	for off := int64(0); off < d.data.size && time.Since(start) < demoPatience; off += step {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := s.ReadAt(p[:min(step, d.data.size-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		r.wholeBytes += int64(n)
	}
	r.whole = time.Since(start)
	part := ""
	if r.wholeBytes < d.data.size {
		part = fmt.Sprintf(" (%s of it)", size.Format(r.wholeBytes))
	}
	d.say("  the whole file%-12s%s, %s", part, durationText(r.whole), rateText(r.wholeBytes, r.whole))
	return nil
}

// prove compares the source with what it should hold now.
func (d *demo) prove(r *demoResult) error {
	f, err := os.Open(d.source)
	if err != nil {
		return err
	}
	defer f.Close()
	got, err := sumOf(f, d.data.size)
	if err != nil {
		return err
	}
	if want := d.data.sum(); got != want {
		return fmt.Errorf("the source's checksum is %016x, want %016x: %w", got, want, memferry.ErrCorrupt)
	}
	r.proved = true
	d.say("  source's checksum         %016x: it has every write", got)
	return nil
}

func (d *demo) summary(m, x demoResult) error {
	d.say("")
	row := func(name string, f func(demoResult) string) []string { return []string{name, f(m), f(x)} }
	pair := func(a, b time.Duration) string { return durationText(a) + " / " + durationText(b) }
	return table(d.env.Stdout, [][]string{
		{"", "MANAGED", "DIRECT"},
		row("first byte", func(r demoResult) string { return durationText(r.first) }),
		row("random 4 KiB read, p50 / p99", func(r demoResult) string { return pair(r.readP50, r.readP99) }),
		row("4 KiB write + fsync, p50 / p99", func(r demoResult) string { return pair(r.writeP50, r.writeP99) }),
		row("whole file", func(r demoResult) string { return rateText(r.wholeBytes, r.whole) }),
		row("flush", func(r demoResult) string { return durationText(r.flush) }),
		row("source has every write", func(r demoResult) string { return map[bool]string{true: "yes", false: "no"}[r.proved] }),
	})
}

func (d *demo) openSubject(ctx context.Context, direct bool) (subject, error) {
	if d.fuse {
		return d.mountSubject(ctx, direct)
	}
	return d.librarySubject(ctx, direct)
}

// librarySubject opens the same without a mount.
func (d *demo) librarySubject(ctx context.Context, direct bool) (subject, error) {
	remote, err := d.open(ctx, d.url, backend.Options{})
	if err != nil {
		return nil, err
	}
	if direct {
		return &librarySubject{Backend: remote}, nil
	}
	local, err := file.NewMemfd("memferry-demo", remote.Size())
	if err != nil {
		return nil, errors.Join(err, remote.Close())
	}
	r, err := region.Open(ctx, remote, local, region.Options{Logger: d.log})
	if err != nil {
		return nil, err
	}
	return &librarySubject{r, r}, nil
}

type librarySubject struct {
	memferry.Backend
	region *region.Region // nil for direct
}

func (s *librarySubject) local() float64 {
	if s.region == nil {
		return 0
	}
	st := s.region.Stats()
	return percent(st.Present, st.Size)
}

func (s *librarySubject) finish(ctx context.Context) (int64, error) {
	var pushed int64
	var err error
	if s.region != nil {
		err = s.region.Push(ctx)
		pushed = s.region.Stats().PushedBytes
	}
	return pushed, errors.Join(err, s.Close())
}

func (s *librarySubject) abandon() { _ = s.Close() } // an earlier error is being returned
