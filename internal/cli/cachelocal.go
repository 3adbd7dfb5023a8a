package cli

import (
	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/cache"
	"github.com/memferry/memferry/region"
)

// openCache opens the directory that keeps the local side across mounts.
func (s *session) openCache(remote memferry.Backend, ro *region.Options) (memferry.Backend, error) {
	c, err := cache.Open(s.cacheDir, cache.Identity{URL: s.identity, Size: remote.Size()}, cache.Options{Logger: s.log})
	if err != nil {
		return nil, err
	}
	ro.Store = c
	return c.Local(), nil
}
