package file

import (
	"context"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

// TestKnownData asks twice for a run of data, and again after each way to make
// a hole in it: no answer may be from before the hole.
func TestKnownData(t *testing.T) {
	const size = 1 << 20
	b, err := NewMemfd("known", size)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	p := make([]byte, size)
	p[0] = 1
	holes := map[string]func(off, n int64) error{
		"trim":         b.Trim,
		"write zeroes": func(off, n int64) error { return b.WriteZeroes(off, n, 0) },
	}
	for name, hole := range holes {
		if _, err := b.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < size; off += size / 4 {
			if e := extents(t, b, off); len(e) != 1 || e[0].Flags != 0 || e[0].Len != size-off {
				t.Fatalf("%s: extents of data at %d: %+v", name, off, e)
			}
		}
		if err := hole(size/2, 4096); err != nil {
			t.Fatal(err)
		}
		e := extents(t, b, size/4)
		if len(e) != 3 || e[1].Off != size/2 || e[1].Len != 4096 || e[1].Flags&memferry.ExtentHole == 0 {
			t.Errorf("%s: extents around the hole: %+v", name, e)
		}
		// Past the run that is remembered now.
		if e := extents(t, b, size/2+4096); len(e) != 1 || e[0].Flags != 0 {
			t.Errorf("%s: extents behind the hole: %+v", name, e)
		}
	}
}

// TestKnownDataChanges has a hole made between the search and its end.
func TestKnownDataChanges(t *testing.T) {
	var k knownData
	_, changes, ok := k.find(0)
	if ok {
		t.Fatal("known before it was found")
	}
	k.forget()
	k.found(0, 100, changes)
	if end, _, ok := k.find(50); ok {
		t.Errorf("a run up to %d is remembered from before a hole", end)
	}
	_, changes, _ = k.find(50)
	k.found(0, 100, changes)
	if end, _, ok := k.find(99); !ok || end != 100 {
		t.Errorf("find = %d, %v; want 100", end, ok)
	}
	if _, _, ok := k.find(100); ok {
		t.Error("the end is part of the run")
	}
}

// TestKnownDataOfOthers has somebody else punch the hole.
func TestKnownDataOfOthers(t *testing.T) {
	b, err := NewMemfd("known", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	extents(t, b, 0)
	if err := unix.Fallocate(int(b.File().Fd()), punchHole, 4096, 4096); err != nil {
		t.Fatal(err)
	}
	b.known.at = b.known.at.Add(-knownFor)
	if e := extents(t, b, 0); len(e) != 3 {
		t.Errorf("a hole is not seen after %v: %+v", knownFor, e)
	}
}

func extents(t *testing.T, b *Backend, off int64) []memferry.Extent {
	t.Helper()
	e, err := b.Extents(context.Background(), off, b.Size()-off)
	if err != nil {
		t.Fatal(err)
	}
	return e
}
