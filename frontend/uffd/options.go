package uffd

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/memferry/memferry/region"
)

// Options adjust memory. The zero value works.
type Options struct {
	// ChunkSize, Pull, IOTimeout, Rate and Logger are those of region.Options.
	ChunkSize int64
	Pull      region.PullMode
	IOTimeout time.Duration
	Rate      int64
	Logger    *slog.Logger
	// ReadOnly maps the memory without the right to write.
	ReadOnly bool
	// SmallPages forgoes huge pages. They are used where the kernel lets this
	// process have them, and make the arrival of data twice as fast; a single
	// page touched in an otherwise empty 2 MiB then takes all of them.
	SmallPages bool
}

func (o Options) validate() error {
	if o.IOTimeout < 0 || o.Rate < 0 {
		return fmt.Errorf("uffd: negative timeout or rate")
	}
	return nil // the rest is checked by region.Open
}

func (o Options) region() region.Options {
	return region.Options{
		ChunkSize: o.ChunkSize, Pull: o.Pull, IOTimeout: o.IOTimeout, Rate: o.Rate, Logger: o.Logger, ReadOnly: o.ReadOnly,
		// What Sync hands over is to reach the source: the local side is memory.
		Durability: region.DurabilityRemote,
	}
}
