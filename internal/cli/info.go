package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/internal/size"
)

const infoLong = `Tell what the region at URL is: its size, what it can do, and, with --extents, how
much of it holds data. Nothing is changed.`

// regionInfo is what info prints.
type regionInfo struct {
	URL        string      `json:"url"`
	Size       int64       `json:"size"`
	ReadOnly   bool        `json:"read_only"`
	Can        []string    `json:"can"`
	BlockMin   int64       `json:"block_size_minimum,omitempty"`
	BlockBest  int64       `json:"block_size_preferred,omitempty"`
	BlockMax   int64       `json:"block_size_maximum,omitempty"`
	Generation string      `json:"generation,omitempty"`
	Extents    *extentInfo `json:"extents,omitempty"`
}

// extentInfo sums up where the data is.
type extentInfo struct {
	Count  int64 `json:"count"`
	Data   int64 `json:"data_bytes"`
	Zeroes int64 `json:"zero_bytes"` // of these, Holes have no storage
	Holes  int64 `json:"hole_bytes"`
}

func (a *app) infoCmd() *cobra.Command {
	var asJSON, extents bool
	cmd := &cobra.Command{
		Use:   "info URL",
		Short: "Tell what a region is",
		Long:  infoLong,
		Example: `  memferry info nbd://server/disk
  memferry info --extents --json disk.img`,
		Args: positional(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			info, err := a.info(cmd.Context(), args[0], extents)
			if err != nil {
				return fmt.Errorf("info: %w", err)
			}
			return a.printInfo(info, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&extents, "extents", false, "sum up where the data is")
	return cmd
}

func (a *app) info(ctx context.Context, url string, extents bool) (info regionInfo, err error) {
	// For writing where that may be, so that what is said of it is true.
	b, err := a.open(ctx, url, backend.Options{})
	if err != nil {
		b, err = a.open(ctx, url, backend.Options{ReadOnly: true})
	}
	if err != nil {
		return info, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	caps := memferry.CapabilitiesOf(b)
	info = regionInfo{
		URL: url, Size: b.Size(), ReadOnly: caps.ReadOnly, Can: abilities(caps),
		BlockMin: caps.BlockSizes.Min, BlockBest: caps.BlockSizes.Preferred, BlockMax: caps.BlockSizes.Max,
	}
	if caps.Generationer != nil {
		if info.Generation, err = caps.Generationer.Generation(ctx); err != nil {
			return info, about(url, err)
		}
	}
	if extents {
		info.Extents, err = sumExtents(ctx, b, caps)
	}
	return info, about(url, err)
}

func abilities(c memferry.Capabilities) []string {
	can := []string{}
	for _, a := range []struct {
		name string
		has  bool
	}{
		{"write", !c.ReadOnly},
		{"trim", c.Trimmer != nil},
		{"write-zeroes", c.ZeroWriter != nil},
		{"extents", c.Extenter != nil},
		{"generation", c.Generationer != nil},
		{"stream", c.StreamReader != nil},
		{"view", c.Viewer != nil},
	} {
		if a.has {
			can = append(can, a.name)
		}
	}
	return can
}

func sumExtents(ctx context.Context, b memferry.Backend, caps memferry.Capabilities) (*extentInfo, error) {
	if caps.Extenter == nil {
		return nil, withRemedy(fmt.Errorf("extents: %w", memferry.ErrNotSupported), "leave --extents away: all of it may hold data")
	}
	sum := &extentInfo{}
	var last memferry.ExtentFlags
	for off, total := int64(0), b.Size(); off < total; {
		es, err := caps.Extenter.Extents(ctx, off, total-off)
		if err != nil {
			return nil, fmt.Errorf("extents at %d: %w", off, err)
		}
		for _, e := range es {
			if sum.Count == 0 || e.Flags != last {
				sum.Count++
			}
			last = e.Flags
			if e.Flags&memferry.ExtentZero != 0 {
				sum.Zeroes += e.Len
			} else {
				sum.Data += e.Len
			}
			if e.Flags&memferry.ExtentHole != 0 {
				sum.Holes += e.Len
			}
			off += e.Len
		}
		if len(es) == 0 {
			return nil, fmt.Errorf("extents at %d: none: %w", off, memferry.ErrCorrupt)
		}
	}
	return sum, nil
}

func (a *app) printInfo(i regionInfo, asJSON bool) error {
	if asJSON {
		return writeJSON(a.env.Stdout, i)
	}
	rows := [][]string{
		{"url", i.URL},
		{"size", exactSize(i.Size)},
		{"can", strings.Join(append([]string{"read"}, i.Can...), ", ")},
	}
	if i.BlockMin > 1 {
		rows = append(rows, []string{"block size", "multiples of " + size.Format(i.BlockMin)})
	}
	if i.BlockMax > 0 {
		rows = append(rows, []string{"longest request", size.Format(i.BlockMax)})
	}
	if i.Generation != "" {
		rows = append(rows, []string{"generation", i.Generation})
	}
	if e := i.Extents; e != nil {
		rows = append(rows, []string{"extents", fmt.Sprintf("%d: %s data, %s zeroes (%s holes)",
			e.Count, size.Format(e.Data), size.Format(e.Zeroes), size.Format(e.Holes))})
	}
	return table(a.env.Stdout, rows)
}
