package mem

import (
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
)

func TestContract(t *testing.T) {
	for name, size := range map[string]int64{"whole pages": 1 << 20, "ragged": 1<<20 + 123} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, func(t testing.TB) memferry.Backend {
				b, err := New(size)
				if err != nil {
					t.Fatal(err)
				}
				return b
			}, backendtest.Options{})
		})
	}
}
