package nbd

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/memferry/memferry"
)

// maxPieces bounds how many pieces of one reply, out of order, are remembered.
const maxPieces = 4096

// ReadStream implements memferry.StreamReader. What is longer than a request
// travels in several at once.
func (c *Client) ReadStream(ctx context.Context, off, n int64, sink func(off, n int64, p []byte) error) error {
	if err := memferry.CheckRange("read", off, n, c.info.Size); err != nil || n == 0 {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := &streaming{c: c, sink: sink}
	from, to := c.widen(off, n)
	return split(from, to-from, c.maxRequest, func(at, n1 int64) error {
		lo, hi := max(at, off), min(at+n1, off+n)
		err := s.read(ctx, memferry.Extent{Off: lo, Len: hi - lo})
		if err != nil {
			cancel(err) // the others are of no use now
		}
		return err
	})
}

// streaming passes on what several requests bring.
type streaming struct {
	c    *Client
	mu   sync.Mutex // held across calls of sink, which must not overlap
	sink func(off, n int64, p []byte) error
	err  error // of sink
}

func (s *streaming) deliver(off, n int64, p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = s.sink(off, n, p)
	}
	return s.err
}

// read performs one request. After a lost connection it asks for what has not
// been delivered, since the sink must not see bytes twice.
func (s *streaming) read(ctx context.Context, want memferry.Extent) error {
	deadline := time.Now().Add(s.c.opt.IOTimeout)
	for todo := []memferry.Extent{want}; len(todo) > 0; {
		want, got := todo[0], delivered{}
		from, to := s.c.widen(want.Off, want.Len)
		err := s.c.request(ctx, request{typ: cmdRead, offset: uint64(from), length: uint32(to - from)}, func(k *call) {
			k.from, k.to, k.deadline = uint64(want.Off), uint64(want.Off+want.Len), deadline
			k.sink = func(off, n int64, p []byte) error {
				if err := s.deliver(off, n, p); err != nil {
					return err
				}
				return got.add(off, n)
			}
		}, nil)
		switch {
		case err == nil:
			s.c.stats.readBytes.Add(want.Len)
			todo = todo[1:]
		case errors.Is(err, errConnLost):
			todo = append(got.missing(want), todo[1:]...)
		default:
			return err
		}
	}
	return nil
}

// delivered are the parts of a request that have come.
type delivered []memferry.Extent

func (d *delivered) add(off, n int64) error {
	if last := len(*d) - 1; last >= 0 && (*d)[last].Off+(*d)[last].Len == off {
		(*d)[last].Len += n
		return nil
	}
	if len(*d) == maxPieces {
		return protocolErrorf("more than %d pieces out of order", maxPieces)
	}
	*d = append(*d, memferry.Extent{Off: off, Len: n})
	return nil
}

// missing returns the parts of want that have not come.
func (d delivered) missing(want memferry.Extent) []memferry.Extent {
	slices.SortFunc(d, func(a, b memferry.Extent) int { return cmp.Compare(a.Off, b.Off) })
	var out []memferry.Extent
	at := want.Off
	for _, g := range d {
		if g.Off > at {
			out = append(out, memferry.Extent{Off: at, Len: g.Off - at})
		}
		at = max(at, g.Off+g.Len)
	}
	if end := want.Off + want.Len; at < end {
		out = append(out, memferry.Extent{Off: at, Len: end - at})
	}
	return out
}
