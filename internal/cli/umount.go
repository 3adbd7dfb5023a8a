package cli

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry/frontend/fuse"
	"github.com/memferry/memferry/internal/control"
	"github.com/memferry/memferry/internal/size"
)

const umountLong = `Unmount the region at PATH: push what was written and not yet pushed, wait until
the remote has it, unmount, and report what was pushed.

While an application has the file open, the command fails and the mount goes
on. Where the mount's process is gone, what it left mounted is cleared away.`

func (a *app) umountCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "umount PATH",
		Aliases: []string{"unmount"},
		Short:   "Push what is dirty, and unmount",
		Long:    umountLong,
		Example: `  memferry umount /mnt/disk.img`,
		Args:    positional(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			sum, err := a.umount(cmd.Context(), args[0])
			if err != nil {
				return fmt.Errorf("umount: %w", err)
			}
			return a.printUnmount(sum, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the summary as JSON")
	return cmd
}

// findMount returns the client of the mount at path, which may also be the
// file in a directory that is the mountpoint, and the absolute mountpoint.
func (a *app) findMount(path string) (*control.Client, string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, "", err
	}
	for _, p := range []string{abs, filepath.Dir(abs)} {
		c, err := control.Find(a.env.controlDirs(), p)
		if err == nil || !errors.Is(err, control.ErrNotMounted) {
			return c, p, err
		}
	}
	return nil, abs, fmt.Errorf("%s: %w", abs, control.ErrNotMounted)
}

func (a *app) umount(ctx context.Context, path string) (unmountSummary, error) {
	c, abs, err := a.findMount(path)
	if errors.Is(err, control.ErrNotMounted) {
		cleared, cerr := fuse.ClearStale(abs)
		if cleared {
			return unmountSummary{Path: abs, Stale: true}, cerr
		}
		return unmountSummary{}, err
	}
	if err != nil {
		return unmountSummary{}, err
	}
	stop := startProgress(progress{
		label: "push", out: a.env.Stderr, sink: a.sink, terminal: a.env.isTerminal(a.env.Stderr),
		sample: a.pushSample(ctx, c),
	})
	var sum unmountSummary
	err = c.Unmount(ctx, &sum)
	stop()
	if err != nil {
		return sum, about(abs, err)
	}
	return sum, nil
}

// pushSample shows how much of the backlog at the beginning is left.
func (a *app) pushSample(ctx context.Context, c *control.Client) func() sample {
	var total int64
	var last sample
	return func() sample {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		var st mountStatus
		if c.Status(ctx, &st) != nil || st.Region == nil {
			return last // gone, most likely
		}
		left := st.Region.Dirty + st.Region.Pushing
		total = max(total, left)
		if total > 0 {
			last = sample{total - left, total, size.Format(st.PushRate) + "/s"}
		}
		return last
	}
}

func (a *app) printUnmount(s unmountSummary, asJSON bool) error {
	if asJSON {
		return writeJSON(a.env.Stdout, s)
	}
	text := fmt.Sprintf("unmounted %s: pushed %s in %s, %s in all", s.Path, size.Format(s.Pushed),
		durationText(time.Duration(s.Seconds*float64(time.Second))), size.Format(s.Total))
	switch {
	case s.Stale:
		text = fmt.Sprintf("cleared what a dead mount left at %s", s.Path)
	case s.Direct:
		text = "unmounted " + s.Path
	}
	_, err := fmt.Fprintln(a.env.Stdout, text)
	return err
}
