package extent

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/memferry/memferry"
)

func TestList(t *testing.T) {
	l := New(10, 100)
	l.Add(20, 0)
	l.Add(20, Hole) // nothing
	l.Add(15, Hole) // passed already
	l.Add(30, 0)    // joins
	l.Add(60, Hole)
	if l.Next() != 60 {
		t.Errorf("Next = %d, want 60", l.Next())
	}
	l.Add(1000, 0) // cut
	want := []memferry.Extent{{Off: 10, Len: 20}, {Off: 30, Len: 30, Flags: Hole}, {Off: 60, Len: 40}}
	if d := cmp.Diff(want, l.Extents); d != "" || l.Next() != 100 {
		t.Errorf("Next = %d, extents differ (-want +got):\n%s", l.Next(), d)
	}
}
