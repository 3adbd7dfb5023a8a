package nbd

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

// blockPeer notes what it is asked for.
type blockPeer struct {
	*peer
	mu    sync.Mutex
	asked []string
}

func newBlockPeer(b blockSizes) *blockPeer {
	p := &blockPeer{peer: newPeer()}
	p.blocks = &b
	p.answer = func(rq request, payload []byte) ([]byte, bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.asked = append(p.asked, fmt.Sprintf("%s %d+%d", commandName(rq.typ), rq.offset, rq.length))
		return p.serve(rq, payload)
	}
	return p
}

// take returns what was asked since the last time.
func (p *blockPeer) take() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	asked := map[string]int{}
	for _, a := range p.asked {
		asked[a]++
	}
	p.asked = nil
	return asked
}

// TestBlocksRequests: an unaligned write reads no more than the blocks at its
// edges, and an unaligned read is one request.
func TestBlocksRequests(t *testing.T) {
	read, write := commandName(cmdRead), commandName(cmdWrite)
	p := newBlockPeer(blockSizes{512, 4096, 1 << 16})
	c, err := p.client(ClientOptions{IOTimeout: hang})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, x := range []struct {
		off, n int64
		want   []string
	}{
		{512, 1024, []string{write + " 512+1024"}},
		{513, 3, []string{read + " 512+512", write + " 512+512"}},
		{512, 3, []string{read + " 512+512", write + " 512+512"}},
		{1021, 3, []string{read + " 512+512", write + " 512+512"}},
		{1000, 100, []string{read + " 512+512", read + " 1024+512", write + " 512+1024"}},
		{1000, 1048, []string{read + " 512+512", write + " 512+1536"}},
		{1024, 1000, []string{read + " 1536+512", write + " 1024+1024"}},
		{100, 100_000, []string{read + " 0+512", read + " 99840+512", write + " 0+65536", write + " 65536+34816"}},
	} {
		if _, err := c.WriteAt(make([]byte, x.n), x.off); err != nil {
			t.Fatal(err)
		}
		got := p.take()
		for _, w := range x.want {
			if got[w]--; got[w] == 0 {
				delete(got, w)
			} else if got[w] < 0 {
				t.Errorf("write of %d at %d: no %s", x.n, x.off, w)
			}
		}
		if len(got) > 0 {
			t.Errorf("write of %d at %d: also %v", x.n, x.off, got)
		}
	}
	if _, err := c.ReadAt(make([]byte, 5000), 700); err != nil {
		t.Fatal(err)
	}
	if got := p.take(); len(got) != 1 || got[read+" 512+5632"] != 1 {
		t.Errorf("read of 5000 at 700: %v", got)
	}
}

// TestBlocksNeighbours has several writers change bytes of their own in blocks
// that they share, with others that write whole blocks, and trims and zeroes
// next to them. Nobody's bytes may be lost.
func TestBlocksNeighbours(t *testing.T) {
	const writers, rounds, step, block = 6, 60, 700, 4096
	p := newBlockPeer(blockSizes{block, block, 1 << 16})
	p.export |= FlagCanMultiConn | FlagSendWriteZeroes
	p.content = make([]byte, peerSize)
	slow := p.answer
	p.answer = func(rq request, payload []byte) ([]byte, bool) {
		reply, end := slow(rq, payload)
		time.Sleep(50 * time.Microsecond) // between what is read and what is written
		return reply, end
	}
	c, err := p.client(ClientOptions{IOTimeout: hang, Connections: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var wg sync.WaitGroup
	const whole = 2 * block // after the shared ones, and in the way of the last writer
	for w := range int64(writers) {
		wg.Go(func() {
			for i := range byte(rounds) {
				if _, err := c.WriteAt(bytes.Repeat([]byte{i + 1}, step), w*step); err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for i := range byte(rounds) {
			if _, err := c.WriteAt(bytes.Repeat([]byte{i + 1}, block), whole); err != nil {
				t.Errorf("whole blocks: %v", err)
			}
			if err := c.WriteZeroes(whole+block-100, 200, memferry.ZeroNoHole); err != nil {
				t.Errorf("zeroes: %v", err)
			}
		}
	})
	wg.Wait()
	got := make([]byte, whole+block)
	if _, err := c.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, len(got))
	copy(want, bytes.Repeat([]byte{rounds}, writers*step))
	copy(want[whole:], bytes.Repeat([]byte{rounds}, block-100))
	if d := firstDifference(got, want); d < len(want) {
		t.Errorf("byte %d is %d, want %d: a write was lost", d, got[d], want[d])
	}
}

// TestBlockLocks: who waits for whom.
func TestBlockLocks(t *testing.T) {
	c := &Client{align: 100, opt: ClientOptions{IOTimeout: hang}, ctx: context.Background()}
	hold := func(off, n int64) *blockHold {
		t.Helper()
		h, err := c.blocks.lock(t.Context(), c, off, n, time.Now().Add(hang))
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	for _, x := range []struct {
		name     string
		off1, n1 int64
		off2, n2 int64
		behind   bool
	}{
		{"whole blocks, the same", 0, 200, 0, 200, false},
		{"parts of one block", 10, 10, 50, 10, true},
		{"parts of two blocks", 10, 10, 150, 10, false},
		{"a part and the whole", 10, 10, 0, 100, true},
		{"the whole and a part", 0, 300, 250, 10, true},
		{"edges that touch", 50, 100, 150, 100, true},
		{"the middle of a long one, whole", 50, 300, 100, 100, false},
		{"the middle of a long one, in part", 50, 300, 110, 10, true},
	} {
		first := hold(x.off1, x.n1)
		ctx, cancel := context.WithCancel(t.Context())
		if x.behind {
			cancel() // so that who has to wait fails instead
		}
		second, err := c.blocks.lock(ctx, c, x.off2, x.n2, time.Now().Add(hang))
		if behind := err != nil; behind != x.behind {
			t.Errorf("%s: waits: %t, want %t", x.name, behind, x.behind)
		}
		cancel()
		c.blocks.unlock(first)
		c.blocks.unlock(second)
		if len(c.blocks.holds) != 0 {
			t.Fatalf("%s: %d holds are left", x.name, len(c.blocks.holds))
		}
	}
}

// holes is a peer of which every byte is a hole, so that a read of any length
// costs it nothing.
func holes(size uint64) *peer {
	p := newPeer()
	p.size, p.content, p.structured = size, nil, true
	p.blocks = &blockSizes{4096, 4096, 1 << 25}
	p.answer = func(rq request, _ []byte) ([]byte, bool) {
		return appendOffsetHole(nil, replyFlagDone, rq.cookie, rq.offset, rq.length), false
	}
	return p
}

// TestBlocksNoBuffer: what does not begin or end with a block costs no copy of
// the range.
func TestBlocksNoBuffer(t *testing.T) {
	const n = 64 << 20
	c, err := holes(128 << 20).client(ClientOptions{IOTimeout: hang})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := bytes.Repeat([]byte{1}, n)
	passed := int64(0)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := c.ReadAt(p, 777); err != nil {
		t.Fatal(err)
	}
	err = c.ReadStream(t.Context(), 777, n, func(off, n int64, p []byte) error {
		if off < 777 || p != nil {
			t.Errorf("%d bytes at %d", n, off)
		}
		passed += n
		return nil
	})
	if err != nil || passed != n {
		t.Fatalf("stream of %d bytes passed %d: %v", n, passed, err)
	}
	runtime.ReadMemStats(&after)
	if d := after.TotalAlloc - before.TotalAlloc; d > n/8 {
		t.Errorf("reading %d bytes twice took %d bytes of memory", n, d)
	}
	if i := bytes.IndexByte(p, 1); i >= 0 {
		t.Errorf("byte %d was not read", i)
	}
}

// TestStreamPipelined: a peer that answers only once as many requests have come
// as are to be under way at once, and takes note of more.
func TestStreamPipelined(t *testing.T) {
	const piece, pieces = 64 << 10, 3 * maxParallel
	p := newPeer()
	p.size = pieces * piece
	p.content = newPattern(pieces * piece).data
	p.pair, p.hand = unixPair(t), make(chan net.Conn, 1)
	c, err := p.client(ClientOptions{IOTimeout: hang, MaxRequest: piece})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := &byHand{Client: c, p: p, server: <-p.hand}
	defer h.server.Close()
	got := make([]byte, p.size)
	var calls, bytesSeen int
	var inside atomic.Int32
	done := start(func() error {
		return c.ReadStream(t.Context(), 0, int64(p.size), func(off, n int64, b []byte) error {
			if inside.Add(1) != 1 {
				t.Error("calls of the sink overlap")
			}
			defer inside.Add(-1)
			calls++
			bytesSeen += copy(got[off:][:n], b)
			return nil
		})
	})
	var waiting []request
	for range maxParallel {
		waiting = append(waiting, h.request(t))
	}
	_ = h.server.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, _ := h.server.Read(make([]byte, 1)); n > 0 {
		t.Errorf("more than %d requests are under way", maxParallel)
	}
	_ = h.server.SetReadDeadline(time.Now().Add(hang))
	rng := testenv.Rand(t)
	for answered := 0; answered < pieces; answered++ {
		i := rng.IntN(len(waiting)) // out of order
		rq := waiting[i]
		h.answer(t, rq, p.content[rq.offset:][:rq.length])
		if answered+len(waiting) < pieces {
			waiting[i] = h.request(t)
		} else {
			waiting = append(waiting[:i], waiting[i+1:]...)
		}
	}
	if err := soon(t, done); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, p.content) || bytesSeen != len(got) {
		t.Errorf("%d calls passed %d bytes; first difference at %d", calls, bytesSeen, firstDifference(got, p.content))
	}
}

// TestStreamDelivered bounds what is remembered of a reply out of order.
func TestStreamDelivered(t *testing.T) {
	var d delivered
	for i := range int64(100_000) {
		if err := d.add(i, 1); err != nil {
			t.Fatal(err)
		}
	}
	if len(d) != 1 {
		t.Errorf("%d parts are remembered of a reply in order", len(d))
	}
	var err error
	for i := int64(200_000); err == nil && i < 400_000; i += 2 {
		err = d.add(i, 1)
	}
	if err == nil || len(d) > maxPieces {
		t.Errorf("%d parts are remembered, error %v", len(d), err)
	}
}
