package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// plain is a backend of bytes that can do nothing beyond the contract.
type plain struct {
	mu     sync.Mutex
	data   []byte
	writes int // bytes
	fail   int64
}

var errBroken = errors.New("broken")

func (p *plain) ReadAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return bytes.NewReader(p.data).ReadAt(b, off)
}

func (p *plain) WriteAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail > 0 && off >= p.fail {
		return 0, errBroken
	}
	if err := memferry.CheckRange("write", off, int64(len(b)), p.Size()); err != nil {
		return 0, err
	}
	p.writes += len(b)
	return copy(p.data[off:], b), nil
}

func (p *plain) Size() int64 { return int64(len(p.data)) }
func (p *plain) Sync() error { return nil }
func (*plain) Close() error  { return nil }

// mapped says of plain where its data is: the second half of each MiB.
type mapped struct{ *plain }

func (m mapped) Extents(_ context.Context, off, n int64) ([]memferry.Extent, error) {
	const half = 512 << 10
	e := memferry.Extent{Off: off, Len: min(n, half-off%half)}
	if off/half%2 == 0 {
		e.Flags = memferry.ExtentZero
	}
	return []memferry.Extent{e}, nil
}

func noisy(t *testing.T, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	noise(p, uint64(testenv.Seed(t)))
	return p
}

func TestCopier(t *testing.T) {
	const n = 3<<20 + 12345
	data := noisy(t, n)
	clear(data[1<<20 : 2<<20])
	t.Run("plain", func(t *testing.T) {
		dst := &plain{data: noisy(t, n+7)}
		tail := string(dst.data[n:])
		c := newCopier(dst, &plain{data: data}, 0)
		c.verify = true
		if err := errors.Join(c.check(), c.run(t.Context())); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dst.data[:n], data) || string(dst.data[n:]) != tail {
			t.Error("wrong bytes")
		}
		if done, total := c.done(); done != total || total != 2*n {
			t.Errorf("done %d of %d", done, total)
		}
	})
	t.Run("blank", func(t *testing.T) {
		dst := &plain{data: make([]byte, n)}
		c := newCopier(dst, &plain{data: data}, 4096)
		c.blank = true
		if err := c.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dst.data, data) || dst.writes != n-1<<20 {
			t.Errorf("wrote %d bytes of %d, of which 1 MiB is zero", dst.writes, n)
		}
	})
	t.Run("extents", func(t *testing.T) {
		src := bytes.Clone(data[:2<<20])
		clear(src[:512<<10])
		clear(src[1<<20 : 1<<20+512<<10])
		dst := &plain{data: noisy(t, 2<<20)}
		c := newCopier(dst, mapped{&plain{data: src}}, 0)
		if err := c.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dst.data, src) {
			t.Error("wrong bytes")
		}
		if c.zeroes.Load() != 1<<20 {
			t.Errorf("%d bytes of zeroes", c.zeroes.Load())
		}
	})
}

func TestCopierFails(t *testing.T) {
	src := &plain{data: noisy(t, 4<<20)}
	c := newCopier(&plain{data: make([]byte, 4<<20), fail: 2 << 20}, src, 0)
	if err := c.run(t.Context()); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "write the target at ") {
		t.Errorf("run: %v", err)
	}
	c = newCopier(&plain{data: make([]byte, 1)}, src, 0)
	if err := c.check(); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("check: %v", err)
	}
	// A source that is shorter than it says.
	c = newCopier(&plain{data: make([]byte, 4<<20)}, shrunk{src}, 0)
	if err := c.run(t.Context()); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("run with a shrunk source: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c = newCopier(&plain{data: make([]byte, 64<<20)}, &plain{data: make([]byte, 64<<20)}, 0)
	if err := c.run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("run when cancelled: %v", err)
	}
}

type shrunk struct{ *plain }

func (s shrunk) ReadAt(b []byte, off int64) (int, error) {
	return bytes.NewReader(s.data[:3<<20]).ReadAt(b, off)
}

func TestVerifyFindsADifference(t *testing.T) {
	src := &plain{data: noisy(t, 2<<20)}
	dst := &plain{data: bytes.Clone(src.data)}
	dst.data[1<<20] ^= 1
	c := newCopier(dst, src, 0)
	c.verify = true
	if err := c.pass(t.Context(), c.compare); err == nil || !strings.Contains(err.Error(), "differs between 1048576 and 1572864") {
		t.Errorf("compare: %v", err)
	}
}
