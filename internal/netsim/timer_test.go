package netsim

import (
	"testing"
	"time"
)

// TestLatenessIsTheLeastOfLateSleeps: load on top of it is not learned, and
// what has become longer is.
func TestLatenessIsTheLeastOfLateSleeps(t *testing.T) {
	var l lateness
	feed := func(n int, d ...time.Duration) {
		for i := range n {
			l.note(d[i%len(d)])
		}
	}
	expect := func(want time.Duration) {
		t.Helper()
		if got := l.usual(); got != want {
			t.Errorf("expects sleeps to end %v late, want %v", got, want)
		}
	}
	expect(0) // before the first sleep: it may be on time
	feed(latenessMemory-1, 50*time.Microsecond)
	expect(0)
	feed(1, 50*time.Microsecond)
	expect(50 * time.Microsecond)
	feed(2*latenessMemory, 60*time.Microsecond, 3*time.Millisecond)
	expect(60 * time.Microsecond)
	feed(1, 20*time.Microsecond) // at once, or bytes would have to wait spinning
	expect(20 * time.Microsecond)
	feed(2*latenessMemory, time.Second)
	expect(maxLateness)
	feed(1, -time.Millisecond) // a sleep that was cut short
	expect(0)
}
