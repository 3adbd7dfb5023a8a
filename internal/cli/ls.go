package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/nbd"
)

const lsLong = `List the exports of the NBD server at URL: their names, sizes, and what can be
done with them. An export name in URL is ignored.`

// exportInfo is one line of ls.
type exportInfo struct {
	Name        string   `json:"name"`
	Description string   `json:"description,omitempty"`
	Size        int64    `json:"size"`
	ReadOnly    bool     `json:"read_only"`
	MultiConn   bool     `json:"multi_conn"`
	Can         []string `json:"can"`
	Generation  string   `json:"generation,omitempty"`
	URL         string   `json:"url"`
}

func (a *app) lsCmd() *cobra.Command {
	var asJSON bool
	timeout := openTimeout
	cmd := &cobra.Command{
		Use:   "ls URL",
		Short: "List the exports of a server",
		Long:  lsLong,
		Example: `  memferry ls nbd://server
  memferry ls --json 'nbd+unix:///?socket=/run/nbd.sock'`,
		Args: positional(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := a.ls(cmd.Context(), args[0], timeout)
			if err != nil {
				return fmt.Errorf("ls: %w", about(args[0], err))
			}
			return a.printExports(list, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().DurationVar(&timeout, "io-timeout", timeout, "how long the server may take")
	return cmd
}

func (a *app) ls(ctx context.Context, url string, timeout time.Duration) ([]exportInfo, error) {
	uri, err := nbd.ParseURI(url)
	if err != nil {
		return nil, withRemedyUnlessSaid(err, "write nbd://HOST[:PORT] or nbd+unix:///?socket=PATH")
	}
	list, err := nbd.List(ctx, uri, nbd.ClientOptions{HandshakeTimeout: timeout, Logger: a.log})
	if err != nil {
		return nil, err
	}
	out := make([]exportInfo, 0, len(list))
	for _, e := range list {
		at := uri
		at.Export = e.Name
		out = append(out, exportInfo{
			Name: e.Name, Description: e.Description, Size: e.Size, Generation: e.Generation, URL: at.String(),
			ReadOnly: e.Flags.Has(nbd.FlagReadOnly), MultiConn: e.Flags.Has(nbd.FlagCanMultiConn), Can: exportCan(e.Flags),
		})
	}
	return out, nil
}

func exportCan(f nbd.TransmissionFlags) []string {
	can := []string{}
	for _, a := range []struct {
		flag nbd.TransmissionFlags
		name string
	}{
		{nbd.FlagSendFlush, "flush"},
		{nbd.FlagSendFUA, "fua"},
		{nbd.FlagSendTrim, "trim"},
		{nbd.FlagSendWriteZeroes, "write-zeroes"},
		{nbd.FlagSendCache, "cache"},
	} {
		if f.Has(a.flag) {
			can = append(can, a.name)
		}
	}
	return can
}

func (a *app) printExports(list []exportInfo, asJSON bool) error {
	if asJSON {
		return writeJSON(a.env.Stdout, list)
	}
	if len(list) == 0 {
		_, err := fmt.Fprintln(a.env.Stdout, "no exports")
		return err
	}
	rows := [][]string{{"NAME", "SIZE", "ACCESS", "CAN", "URL"}}
	for _, e := range list {
		name, access := e.Name, "read-write"
		if name == "" {
			name = "(default)"
		}
		if e.ReadOnly {
			access = "read-only"
		}
		rows = append(rows, []string{name, size.Format(e.Size), access, strings.Join(e.Can, ","), e.URL})
	}
	return table(a.env.Stdout, rows)
}
