package region

import "testing"

// TestBuffersFit: a short request must not hold the memory of a long one.
func TestBuffersFit(t *testing.T) {
	for _, n := range []int64{1, pageSize, pageSize + 1, 64 << 10, 100_000, maxFetch - 1, maxFetch} {
		for range 2 { // a new one, then perhaps the same
			b := getBuffer(n)
			if int64(len(*b)) != n || int64(cap(*b)) > max(pageSize, 2*n) || cap(*b) > maxFetch {
				t.Errorf("%d bytes: length %d, capacity %d", n, len(*b), cap(*b))
			}
			putBuffer(b)
		}
	}
}
