package region

import (
	"errors"
	"strings"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/mem"
)

// coarse is memory that takes blocks of 64 KiB only.
type coarse struct{ *mem.Backend }

func (coarse) BlockSizes() memferry.BlockSizes { return memferry.BlockSizes{Min: 64 << 10} }

func TestRemoteWithLargeBlocksIsRefused(t *testing.T) {
	remote, err := mem.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	local, err := mem.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), coarse{remote}, local, Options{})
	if !errors.Is(err, memferry.ErrNotSupported) || !strings.Contains(err.Error(), "--direct") {
		t.Errorf("error %v: want one that names the remedy", err)
	}
}
