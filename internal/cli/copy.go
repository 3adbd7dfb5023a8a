package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/internal/size"
)

const copyLong = `Copy the region SRC into the region DST.

Only what holds data is moved: runs that the source knows to be empty, and
pieces that turn out to be zero, become holes in the target where it can have
them. Many requests are in flight at once, up to --memory.

Where DST is a path that does not exist, a sparse file of the source's size is
made there, and removed again if the copy fails. Anything else must exist and
be at least as large as the source; what lies beyond the source's size is left
as it is.`

type copyFlags struct {
	memory      size.Bytes
	connections int
	ioTimeout   time.Duration
	verify      bool
	json        bool
	quiet       bool
}

// copySummary is what a copy came to.
type copySummary struct {
	Source   string  `json:"source"`
	Target   string  `json:"target"`
	Size     int64   `json:"size"`
	Data     int64   `json:"data_bytes"`
	Zeroes   int64   `json:"zero_bytes"`
	Seconds  float64 `json:"seconds"`
	Verified bool    `json:"verified"`
}

func (a *app) copyCmd() *cobra.Command {
	f := copyFlags{memory: copyMemory, ioTimeout: openTimeout}
	cmd := &cobra.Command{
		Use:   "copy SRC DST",
		Short: "Copy one region into another",
		Long:  copyLong,
		Example: `  memferry copy nbd://server/disk disk.img
  memferry copy --verify disk.img 'nbd+unix:///disk?socket=/run/nbd.sock'
  memferry copy disk.img 'dir:///backup/disk?size=10G&chunk=1M'`,
		Args: positional(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkConnections(cmd, f.connections); err != nil {
				return err
			}
			sum, err := a.copy(cmd.Context(), args[0], args[1], f)
			if err != nil {
				return fmt.Errorf("copy: %w", err)
			}
			return a.printCopy(sum, f)
		},
	}
	fl := cmd.Flags()
	fl.Var(&f.memory, "memory", "most data in flight at once")
	fl.IntVar(&f.connections, "connections", 0, "connections to each NBD server (default 4)")
	fl.DurationVar(&f.ioTimeout, "io-timeout", f.ioTimeout, "how long a request waits through outages")
	fl.BoolVar(&f.verify, "verify", false, "read both back afterwards and compare")
	fl.BoolVar(&f.json, "json", false, "print the summary as JSON")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "show no progress")
	return cmd
}

func (a *app) copy(ctx context.Context, srcURL, dstURL string, f copyFlags) (sum copySummary, err error) {
	o := backend.Options{IOTimeout: f.ioTimeout, Connections: f.connections}
	ro := o
	ro.ReadOnly = true
	src, err := a.open(ctx, srcURL, ro)
	if err != nil {
		return sum, err
	}
	defer src.Close()
	dst, made, err := a.openTarget(ctx, dstURL, src.Size(), o)
	if err != nil {
		return sum, err
	}
	defer func() {
		err = errors.Join(err, about(dstURL, dst.Close()))
		if err != nil && made != "" {
			err = errors.Join(err, os.Remove(made))
		}
	}()
	if sameFile(src, dst) {
		return sum, withRemedy(fmt.Errorf("%s and %s are the same file", srcURL, dstURL), "choose another target")
	}
	c := newCopier(dst, src, int64(f.memory))
	c.blank, c.verify = made != "", f.verify
	if err := c.check(); err != nil {
		return sum, about(dstURL, err)
	}
	start := time.Now()
	stop := func() {}
	if !f.quiet {
		stop = a.copyProgress(c)
	}
	err = c.run(ctx)
	stop()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return sum, fmt.Errorf("%s to %s: %w", srcURL, dstURL, err)
	}
	return copySummary{
		Source: srcURL, Target: dstURL, Size: src.Size(),
		Data: c.data.Load(), Zeroes: c.zeroes.Load(),
		Seconds: time.Since(start).Seconds(), Verified: f.verify,
	}, nil
}

func (a *app) copyProgress(c *copier) (stop func()) {
	var m meter
	return startProgress(progress{
		label: "copy", out: a.env.Stderr, sink: a.sink, terminal: a.env.isTerminal(a.env.Stderr),
		sample: func() sample {
			done, total := c.done()
			rate := m.update(done, time.Now())
			return sample{done, total, size.Format(rate) + "/s"}
		},
	})
}

// openTarget opens the target, and makes it where it is the path of a file
// that does not exist: made is then that path.
func (a *app) openTarget(ctx context.Context, rawURL string, n int64, o backend.Options) (b memferry.Backend, made string, err error) {
	u, _, err := a.backends().Lookup(rawURL)
	if err != nil {
		return nil, "", err
	}
	if u.Scheme == "file" && u.Query.Get("size") == "" {
		_, err := os.Stat(u.Path)
		if errors.Is(err, fs.ErrNotExist) {
			return a.makeFile(ctx, rawURL, u.Path, n, o)
		}
	}
	// Refused before it is opened, since opening may make it.
	if u.Query.Has("size") {
		if asked, err := u.Bytes("size"); err == nil && asked < n {
			return nil, "", about(rawURL, tooSmall(asked, n))
		}
	}
	b, err = a.open(ctx, rawURL, o)
	return b, "", err
}

func (a *app) makeFile(ctx context.Context, rawURL, path string, n int64, o backend.Options) (memferry.Backend, string, error) {
	// Created here, exclusively, so that what is removed on failure is ours.
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, "", about(rawURL, err)
	}
	err = errors.Join(file.Truncate(n), file.Close())
	var b memferry.Backend
	if err == nil {
		var abs string
		if abs, err = filepath.Abs(path); err == nil {
			b, err = a.open(ctx, (&url.URL{Scheme: "file", Path: abs}).String(), o)
		}
	}
	if err != nil {
		return nil, "", errors.Join(about(rawURL, err), os.Remove(path))
	}
	return b, path, nil
}

// sameFile reports whether two backends are one file under two names.
func sameFile(a, b memferry.Backend) bool {
	fa, fb := memferry.CapabilitiesOf(a).Filer, memferry.CapabilitiesOf(b).Filer
	if fa == nil || fb == nil {
		return false
	}
	ia, errA := fa.File().Stat()
	ib, errB := fb.File().Stat()
	return errA == nil && errB == nil && os.SameFile(ia, ib)
}

func (a *app) printCopy(s copySummary, f copyFlags) error {
	if f.json {
		return writeJSON(a.env.Stdout, s)
	}
	verified := ""
	if s.Verified {
		verified = ", verified"
	}
	d := time.Duration(s.Seconds * float64(time.Second))
	_, err := fmt.Fprintf(a.env.Stdout, "copied %s (%s data, %s zeroes) in %s, %s%s\n",
		size.Format(s.Size), size.Format(s.Data), size.Format(s.Zeroes), durationText(d), rateText(s.Size, d), verified)
	return err
}
