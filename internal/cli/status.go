package cli

import (
	"context"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry/internal/control"
	"github.com/memferry/memferry/internal/size"
)

const statusLong = `Tell what the mounts of this user do, or the one at PATH: how much is local, how
much is dirty or in flight, throughput, and background errors with the last
message of each kind.`

// statusTimeout bounds asking one mount: it answers from memory.
const statusTimeout = 5 * time.Second

func (a *app) statusCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [PATH]",
		Short: "Tell what mounts do",
		Long:  statusLong,
		Example: `  memferry status
  memferry status /mnt/disk.img
  memferry status --json | jq '.[].region.dirty'`,
		Args: positional(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.status(cmd.Context(), args, asJSON); err != nil {
				return fmt.Errorf("status: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON: a list, or with PATH one object")
	return cmd
}

func (a *app) status(ctx context.Context, args []string, asJSON bool) error {
	if len(args) == 1 {
		c, path, err := a.findMount(args[0])
		if err != nil {
			return err
		}
		st, err := askStatus(ctx, c)
		if err != nil {
			return about(path, err)
		}
		if asJSON {
			return writeJSON(a.env.Stdout, st)
		}
		return table(a.env.Stdout, statusDetails(st))
	}
	clients, err := control.All(a.env.controlDirs())
	if err != nil {
		return err
	}
	all := []mountStatus{}
	for _, c := range clients {
		st, err := askStatus(ctx, c)
		if err != nil {
			a.log.Warn("a mount did not answer", "err", err)
			continue
		}
		all = append(all, st)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Path < all[j].Path })
	if asJSON {
		return writeJSON(a.env.Stdout, all)
	}
	if len(all) == 0 {
		_, err := fmt.Fprintln(a.env.Stdout, "nothing is mounted")
		return err
	}
	rows := [][]string{{"PATH", "URL", "MODE", "SIZE", "LOCAL", "DIRTY", "PULL", "PUSH", "REMOTE", "ERRORS"}}
	for _, st := range all {
		rows = append(rows, statusRow(st))
	}
	return table(a.env.Stdout, rows)
}

func askStatus(ctx context.Context, c *control.Client) (mountStatus, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, statusTimeout, fmt.Errorf("no answer within %v", statusTimeout))
	defer cancel()
	var st mountStatus
	err := c.Status(ctx, &st)
	return st, err
}

func statusRow(s mountStatus) []string {
	r := s.Region
	if r == nil {
		return []string{s.Path, s.URL, s.Mode, size.Format(s.Size), "-", "-", "-", "-", "-", "0"}
	}
	return []string{
		s.Path, s.URL, s.Mode, size.Format(s.Size),
		fmt.Sprintf("%.0f%%", percent(r.Present, r.Size)), size.Format(r.Dirty + r.Pushing),
		size.Format(s.PullRate) + "/s", size.Format(s.PushRate) + "/s",
		upText(r.RemoteUp, r.Changed), strconv.FormatInt(s.errorCount(), 10),
	}
}

func upText(up, changed bool) string {
	switch {
	case changed:
		return "changed"
	case up:
		return "up"
	}
	return "down"
}

func statusDetails(s mountStatus) [][]string {
	flags := []string{s.Mode, s.Frontend}
	if s.ReadOnly {
		flags = append(flags, "read-only")
	}
	if s.Passthrough {
		flags = append(flags, "passthrough")
	}
	rows := [][]string{
		{"file", s.File},
		{"url", s.URL},
		{"mode", strings.Join(flags, ", ")},
		{"state", fmt.Sprintf("%s for %s, process %d", s.State, time.Since(s.Started).Round(time.Second), s.PID)},
		{"size", exactSize(s.Size)},
	}
	if s.Cache != "" {
		rows = append(rows, []string{"cache", s.Cache})
	}
	r := s.Region
	if r == nil {
		return rows
	}
	rtt := "unknown"
	if r.RTT > 0 {
		rtt = durationText(r.RTT)
	}
	rows = append(rows,
		[]string{"local", fmt.Sprintf("%s (%.1f%%)", size.Format(r.Present), percent(r.Present, r.Size))},
		[]string{"dirty", fmt.Sprintf("%s, and %s on the way", size.Format(r.Dirty), size.Format(r.Pushing))},
		[]string{"fetching", fmt.Sprintf("%s, of a window of %s", size.Format(r.Fetching), size.Format(r.Window))},
		[]string{"pulled", fmt.Sprintf("%s, and %s of holes; now %s/s", size.Format(r.PulledBytes), size.Format(r.SkippedBytes), size.Format(s.PullRate))},
		[]string{"pushed", fmt.Sprintf("%s; now %s/s", size.Format(r.PushedBytes), size.Format(s.PushRate))},
		[]string{"reads that waited", strconv.FormatInt(r.DemandWaits, 10)},
		[]string{"remote", upText(r.RemoteUp, r.Changed) + ", round trip " + rtt},
	)
	for _, e := range r.Errors {
		rows = append(rows, []string{string(e.Kind) + " errors", fmt.Sprintf("%d, last %s ago: %s",
			e.Count, time.Since(e.Time).Round(time.Second), oneLine(e.Last))})
	}
	return rows
}
