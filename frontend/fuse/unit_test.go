package fuse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/memferry/memferry"
)

func TestParseMounts(t *testing.T) {
	const info = `22 27 0:21 / /proc rw,relatime - proc proc rw
42 27 0:39 / /mnt/a\040b\134c rw,nosuid shared:7 master:1 - fuse.memferry memferry rw,user_id=0
43 27 0:40 /x /mnt/f rw - fuse.other memferry rw
garbage
44 27 x:y / /mnt/g rw - fuse.memferry memferry rw
`
	all, err := parseMounts(strings.NewReader(info), func(mountEntry) bool { return true })
	if err != nil || len(all) != 3 {
		t.Fatalf("%v, %v", all, err)
	}
	if m := all[1]; m.path != `/mnt/a b\c` || !m.ours() || m.dev != 39 {
		t.Errorf("%+v", m)
	}
	if all[2].ours() {
		t.Error("another program's mount counts as ours")
	}
}

func FuzzParseMount(f *testing.F) {
	f.Add(`42 27 0:39 / /mnt/a\040b\134c rw,nosuid shared:7 - fuse.memferry memferry rw`)
	f.Add(`42 27 0:39 / \ - x`)
	f.Fuzz(func(t *testing.T, line string) {
		if m, ok := parseMount(line); ok && len(m.path) > len(line) {
			t.Errorf("path of %d bytes from a line of %d", len(m.path), len(line))
		}
	})
}

func TestToStatus(t *testing.T) {
	for err, want := range map[error]syscall.Errno{
		nil:                      0,
		context.Canceled:         syscall.EINTR,
		memferry.ErrReadOnly:     syscall.EROFS,
		memferry.ErrNoSpace:      syscall.ENOSPC,
		memferry.ErrChanged:      syscall.ESTALE,
		memferry.ErrTimeout:      syscall.EIO,
		memferry.ErrClosed:       syscall.EIO,
		memferry.ErrCorrupt:      syscall.EIO,
		memferry.ErrNotSupported: syscall.EOPNOTSUPP,
		syscall.EDQUOT:           syscall.ENOSPC,
	} {
		wrapped := err
		if err != nil {
			wrapped = fmt.Errorf("wrapped: %w", err)
		}
		if got := toStatus(wrapped); got != gofuse.Status(want) {
			t.Errorf("%v: got %v, want %v", err, got, want)
		}
	}
}

func TestOptions(t *testing.T) {
	o, err := Options{Name: "/a/b/"}.withDefaults(memferry.Capabilities{ReadOnly: true})
	if err != nil || o.Name != "a-b" || !o.ReadOnly || o.Mode != 0o555 || o.Logger == nil {
		t.Errorf("%+v, %v", o, err)
	}
	for _, bad := range []Options{
		{Name: ".."}, {Name: strings.Repeat("x", maxName+1)}, {Mode: 1 << 20}, {ReadAhead: -1},
	} {
		if _, err := bad.withDefaults(memferry.Capabilities{}); err == nil {
			t.Errorf("%+v passes", bad)
		}
	}
}

func TestArenaQueues(t *testing.T) {
	a, err := newArena(arenaSlots)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	seen := map[int32]bool{}
	for range arenaSlots {
		slot, err := a.get(context.Background())
		if err != nil || seen[slot] {
			t.Fatalf("slot %d, %v", slot, err)
		}
		seen[slot] = true
		a.bytes(slot, maxRequest)[maxRequest-1] = 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := a.get(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a slot beyond the last: %v", err)
	}
	a.put(7)
	if slot, err := a.get(ctx); slot != 7 || err != nil {
		t.Errorf("got %d, %v", slot, err)
	}
}

func TestProbeIsDecided(t *testing.T) {
	f := Probe()
	if f.Mount == nil && f.Direct != nil && f.Helper != nil {
		t.Errorf("%+v", f)
	}
}
