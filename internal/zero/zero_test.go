package zero

import (
	"errors"
	"testing"
)

func TestWrite(t *testing.T) {
	got := make([]byte, 2*MaxPiece+10)
	for i := range got {
		got[i] = 1
	}
	longest := 0
	put := func(p []byte, off int64) error {
		longest = max(longest, len(p))
		copy(got[off:], p)
		return nil
	}
	if err := Write(5, MaxPiece+3, 100, put); err != nil || longest != 100 {
		t.Fatalf("Write: %v, longest piece %d, want 100", err, longest)
	}
	for i, b := range got {
		if inside := i >= 5 && i < 5+MaxPiece+3; (b == 0) != inside {
			t.Fatalf("byte %d is %d", i, b)
		}
	}
	if err := Write(0, int64(len(got)), 1<<40, put); err != nil || longest != MaxPiece {
		t.Errorf("Write: %v, longest piece %d, want %d", err, longest, MaxPiece)
	}
}

func TestWriteStops(t *testing.T) {
	wrong, calls := errors.New("full"), 0
	err := Write(0, 100, 10, func([]byte, int64) error { calls++; return wrong })
	if !errors.Is(err, wrong) || calls != 1 {
		t.Errorf("Write: %v after %d calls", err, calls)
	}
}

func TestIs(t *testing.T) {
	p := make([]byte, 2*len(known)+3)
	if !Is(nil) || !Is(p) {
		t.Error("zeroes are not recognised")
	}
	for _, i := range []int{0, len(known) - 1, len(known), len(p) - 1} {
		p[i] = 1
		if Is(p) {
			t.Errorf("byte %d is not seen", i)
		}
		p[i] = 0
	}
}
