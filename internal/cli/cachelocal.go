package cli

import (
	"context"
	"fmt"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/region"
)

// openCache opens the directory that keeps the local side across mounts.
//
// BUG(cli): the persistent cache is not wired in yet.
func (s *session) openCache(context.Context, memferry.Backend, *region.Options) (memferry.Backend, error) {
	return nil, fmt.Errorf("--cache is %w yet", memferry.ErrNotSupported)
}
