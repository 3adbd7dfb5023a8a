package cli

import (
	"context"
	"fmt"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/cache"
	"github.com/memferry/memferry/region"
)

// openCache opens the directory that keeps the local side across mounts.
func (s *session) openCache(ctx context.Context, remote memferry.Backend, ro *region.Options) (memferry.Backend, error) {
	gen := ""
	if g := memferry.CapabilitiesOf(remote).Generationer; g != nil {
		var err error
		if gen, err = g.Generation(ctx); err != nil {
			return nil, fmt.Errorf("generation: %w", err)
		}
	}
	c, err := cache.Open(s.cacheDir, cache.Identity{URL: s.identity, Size: remote.Size(), Generation: gen}, cache.Options{Logger: s.log})
	if err != nil {
		return nil, advised(err)
	}
	ro.Store = c
	return c.Local(), nil
}
