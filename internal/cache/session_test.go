package cache

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/chunk"
)

func TestRemoteSession(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	if err := s.setRemoteSession("one"); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*disk{d.killed(), d.powerLost(rand.New(rand.NewPCG(1, 2)))} {
		k, err := loadStore(d, "boot")
		if err != nil {
			t.Fatal(err)
		}
		if got := k.remoteSession(); got != "one" {
			t.Errorf("loaded %q", got)
		}
	}
	if err := s.close(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.setRemoteSession("two"); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("after close: %v", err)
	}
}

// TestVersionOne opens what an earlier program has left. That program must
// never find a state of its own version with records that it does not know.
func TestVersionOne(t *testing.T) {
	d := newDisk()
	s := newStore(t, d, "boot", 1<<20)
	if err := s.commit([]chunk.Change{{Page: 3, N: 2, State: chunk.Dirty}}); err != nil {
		t.Fatal(err)
	}
	if err := s.close(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	setVersion(t, d, 1)
	s, err := openStore(d, "boot", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if got := loaded(t, s); got[2] != chunk.Absent || got[3] != chunk.Dirty || got[4] != chunk.Dirty {
		t.Errorf("loaded %v", got[:6])
	}
	if err := s.setRemoteSession("one"); err != nil {
		t.Fatal(err)
	}
	if v := stateVersionOf(t, d.killed()); v != stateVersion {
		t.Errorf("the state has version %d, and a journal of version %d", v, stateVersion)
	}
	setVersion(t, d, stateVersion+1)
	if _, err := loadStore(d, "boot"); !errors.Is(err, memferry.ErrCorrupt) || !strings.Contains(err.Error(), "version") {
		t.Errorf("a later version: %v", err)
	}
}

// setVersion makes the state pass for one of another version.
func setVersion(t *testing.T, d *disk, version uint32) {
	t.Helper()
	p, err := d.read(stateName, maxState)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(p[8:], version)
	clear(p[24:32])
	binary.LittleEndian.PutUint64(p[24:], xxhash.Sum64(p))
	f, err := d.create(stateName)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(p, 0)
	if err := errors.Join(err, f.Sync(), f.Close(), d.syncDir()); err != nil {
		t.Fatal(err)
	}
}

func stateVersionOf(t *testing.T, d *disk) uint32 {
	t.Helper()
	p, err := d.read(stateName, maxState)
	if err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint32(p[8:])
}
