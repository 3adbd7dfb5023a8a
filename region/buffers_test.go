package region

import (
	"math/rand/v2"
	"testing"
)

// TestBuffersDoNotOverlap takes and gives back at random, and writes a mark of
// its own into every buffer.
func TestBuffersDoNotOverlap(t *testing.T) {
	b, err := newBuffers(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	type marked struct {
		buffer
		mark byte
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	var taken []marked
	heap, mapped := 0, 0
	for i := range 4000 {
		if len(taken) > 0 && rnd.IntN(5) < 2 {
			k := rnd.IntN(len(taken))
			m := taken[k]
			if m.p[0] != m.mark || m.p[len(m.p)-1] != m.mark {
				t.Fatalf("buffer %+v was written to by another's owner", m.pages)
			}
			b.put(m.buffer)
			taken[k] = taken[len(taken)-1]
			taken = taken[:len(taken)-1]
			continue
		}
		n := 1 + rnd.Int64N(40_000)
		m := marked{b.get(n), byte(i)}
		if int64(len(m.p)) != n || int64(cap(m.p)) > n+pageSize {
			t.Fatalf("%d bytes: length %d, capacity %d", n, len(m.p), cap(m.p))
		}
		m.p[0], m.p[n-1] = m.mark, m.mark
		if m.pages == 0 {
			heap++
		} else {
			mapped++
		}
		taken = append(taken, m)
	}
	if heap == 0 || mapped == 0 {
		t.Errorf("%d buffers from the heap, %d mapped: both must have happened", heap, mapped)
	}
	for _, m := range taken {
		b.put(m.buffer)
	}
	whole := b.get(1 << 20)
	if whole.pages != 256 {
		t.Error("what was given back is not free")
	}
	b.put(whole)
	if err := b.close(); err != nil {
		t.Error(err)
	}
}

func TestNoBuffersComeFromTheHeap(t *testing.T) {
	b, err := newBuffers(0)
	if err != nil {
		t.Fatal(err)
	}
	f := b.get(5000)
	if len(f.p) != 5000 || f.pages != 0 {
		t.Errorf("got %d bytes in %d pages", len(f.p), f.pages)
	}
	b.put(f)
	if err := b.close(); err != nil {
		t.Error(err)
	}
}
