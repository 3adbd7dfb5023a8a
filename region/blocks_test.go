package region

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/internal/testenv"
)

// coarse is memory that takes whole blocks only.
type coarse struct {
	*mem.Backend
	block int64
}

func newCoarse(t testing.TB, size, block int64) coarse {
	t.Helper()
	m, err := mem.New(size)
	if err != nil {
		t.Fatal(err)
	}
	return coarse{m, block}
}

var errUnaligned = errors.New("not whole blocks")

func (c coarse) aligned(off, n int64) error {
	if off%c.block != 0 || n%c.block != 0 {
		return fmt.Errorf("%d bytes at %d: %w", n, off, errUnaligned)
	}
	return nil
}

func (c coarse) BlockSizes() memferry.BlockSizes { return memferry.BlockSizes{Min: c.block} }

// Capabilities leaves out what a remote would not have.
func (c coarse) Capabilities() memferry.Capabilities {
	return memferry.Capabilities{Trimmer: c, ZeroWriter: c, Extenter: c, BlockSizes: c.BlockSizes()}
}

func (c coarse) ReadAt(p []byte, off int64) (int, error) {
	if err := c.aligned(off, int64(len(p))); err != nil {
		return 0, err
	}
	return c.Backend.ReadAt(p, off)
}

func (c coarse) WriteAt(p []byte, off int64) (int, error) {
	if err := c.aligned(off, int64(len(p))); err != nil {
		return 0, err
	}
	return c.Backend.WriteAt(p, off)
}

func (c coarse) Trim(off, n int64) error {
	if err := c.aligned(off, n); err != nil {
		return err
	}
	return c.Backend.Trim(off, n)
}

func (c coarse) WriteZeroes(off, n int64, flags memferry.ZeroFlags) error {
	if err := c.aligned(off, n); err != nil {
		return err
	}
	return c.Backend.WriteZeroes(off, n, flags)
}

func (c coarse) Extents(ctx context.Context, off, n int64) ([]memferry.Extent, error) {
	if err := c.aligned(off, n); err != nil {
		return nil, err
	}
	return c.Backend.Extents(ctx, off, n)
}

func TestBlocksContract(t *testing.T) {
	for _, block := range []int64{8 << 10, 64 << 10} {
		t.Run(fmt.Sprint(block), func(t *testing.T) {
			backendtest.Run(t, func(t testing.TB) memferry.Backend {
				e, err := newBlocks(newEndpoint(newCoarse(t, 1<<20, block)))
				if err != nil {
					t.Fatal(err)
				}
				return e.Backend
			}, backendtest.Options{})
		})
	}
}

// TestPagesOfLargeBlocks writes to a region whose remote takes only blocks of
// many pages, while pushes of pages of the same blocks run.
func TestPagesOfLargeBlocks(t *testing.T) {
	const size, block = 2 << 20, 64 << 10
	remote := newCoarse(t, size, block)
	want := make([]byte, size)
	rnd := testenv.Rand(t)
	for i := range want {
		want[i] = byte(rnd.Uint32())
	}
	if _, err := remote.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	local, err := mem.New(size)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(t.Context(), kept{remote}, local, Options{ChunkSize: MinChunkSize, PushInterval: 1, PushIdle: -1})
	if err != nil {
		t.Fatal(err)
	}
	for range 2000 {
		off := rnd.Int64N(size / 4) // of few blocks, so that pushes meet
		n := min(1+rnd.Int64N(3*pageSize), size-off)
		p := bytes.Repeat([]byte{byte(rnd.Uint32())}, int(n))
		copy(want[off:], p)
		if _, err := r.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, size)
	if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the region has other bytes, or %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := remote.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the remote has other bytes, or %v", err)
	}
}

// kept stays open when the region closes it.
type kept struct{ coarse }

func (kept) Close() error { return nil }

func TestBlocksThatCantBe(t *testing.T) {
	for name, remote := range map[string]coarse{
		"too large":   newCoarse(t, 8<<20, 2<<20),
		"part at end": newCoarse(t, 1<<20+4096, 64<<10),
	} {
		t.Run(name, func(t *testing.T) {
			local, err := mem.New(remote.Size())
			if err != nil {
				t.Fatal(err)
			}
			_, err = Open(t.Context(), remote, local, Options{})
			if !errors.Is(err, memferry.ErrNotSupported) || !strings.Contains(err.Error(), "; serve it with smaller blocks") {
				t.Errorf("error %v: want one that names the remedy", err)
			}
		})
	}
}
