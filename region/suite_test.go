package region_test

import (
	"context"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/region"
)

// TestBackendSuite runs the contract of a backend on regions.
func TestBackendSuite(t *testing.T) {
	for _, mode := range []region.PullMode{region.PullFull, region.PullDemand, region.PullNone} {
		t.Run(mode.String(), func(t *testing.T) {
			backendtest.Run(t, func(t testing.TB) memferry.Backend {
				const size = 1<<20 + 300
				remote, err := mem.New(size)
				if err != nil {
					t.Fatal(err)
				}
				local, err := mem.New(size)
				if err != nil {
					t.Fatal(err)
				}
				r, err := region.Open(context.Background(), remote, local, region.Options{Pull: mode})
				if err != nil {
					t.Fatal(err)
				}
				return r
			}, backendtest.Options{})
		})
	}
}
