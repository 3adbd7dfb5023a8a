package uffd

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestProtected: the kernel remembers which pages of shared memory were not
// written to, also when it has them taken away; and poison is no such page.
func TestProtected(t *testing.T) {
	f := openFD(t, FeatureWPAsync|FeaturePagefaultWP|FeatureWPShmem|FeatureMissingShmem|FeatureMinorShmem|FeaturePoison)
	s := scanner(t)
	const pages = 8
	fd := memfd(t, pages*page)
	m, addr := mapped(t, pages*page, fd, unix.MAP_SHARED)
	if _, err := f.Register(addr, uintptr(len(m)), ModeMissing|ModeMinor|ModeWP); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Copy(addr, pattern(4*page, 1), Protect); err != nil {
		t.Fatal(err)
	}
	protected := func() (ps []int) {
		t.Helper()
		err := s.Protected(addr, addr+uintptr(len(m)), func(r Run) error {
			for a := uintptr(r.Start); a < uintptr(r.End); a += page {
				ps = append(ps, int(a-addr)/page)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return ps
	}
	m[2*page] = 42
	if got := protected(); !slices.Equal(got, []int{0, 1, 3}) {
		t.Errorf("mapped: %v", got)
	}
	if err := unix.Madvise(m, unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if got := protected(); !slices.Equal(got, []int{0, 1, 3}) {
		t.Errorf("taken away: %v", got)
	}
	if w := written(t, s, addr, len(m)); len(w) != 0 {
		t.Errorf("written, of what is not mapped: %v", w)
	}
	if _, err := f.Continue(addr, page, Protect); err != nil {
		t.Fatal(err)
	}
	if got := protected(); !slices.Equal(got, []int{0, 1, 3}) {
		t.Errorf("one shown again: %v", got)
	}
	if err := unix.Madvise(m[page:2*page], unix.MADV_REMOVE); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Poison(addr+page, page, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		t.Fatal(err)
	}
	if err := f.WriteProtect(addr+page, page, false, NoWake); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Poison(addr+page, page, 0); err != nil {
		t.Errorf("poison, once the marker is gone: %v", err)
	}
	if got := protected(); !slices.Equal(got, []int{0, 3}) {
		t.Errorf("one poisoned: %v", got)
	}
}
