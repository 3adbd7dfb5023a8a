package cache

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/memferry/memferry/internal/testenv"
)

// statuses unpacks a map.
func statuses(m *pageMap) []status {
	var out []status
	m.runs(func(page, n int64, s status) error {
		if page != int64(len(out)) {
			panic("runs are not contiguous")
		}
		out = append(out, slices.Repeat([]status{s}, int(n))...)
		return nil
	})
	return out
}

func randomRun(r *rand.Rand, pages int64) (page, n int64) {
	page = r.Int64N(pages)
	n = 1 + r.Int64N(pages-page)
	if r.IntN(2) == 0 {
		n = min(n, 1+r.Int64N(200))
	}
	return page, n
}

func TestPageMapAgainstModel(t *testing.T) {
	r := testenv.Rand(t)
	for _, pages := range []int64{1, 63, 64, 1000, leafPages, leafPages + 1, 2*leafPages + 777} {
		m, model := newPageMap(pages), make([]status, pages)
		var snap *pageMap
		var snapModel []status
		for range 60 {
			page, n := randomRun(r, pages)
			part := model[page : page+n]
			switch r.IntN(8) {
			case 0:
				m.dropClean()
				for i, s := range model {
					if s == clean {
						model[i] = absent
					}
				}
			case 1, 2:
				needs := slices.Contains(part, clean)
				if got := m.needsIntent(page, n); got != needs {
					t.Fatalf("needsIntent(%d, %d) = %t, want %t", page, n, got, needs)
				}
				m.intend(page, n)
				for i, s := range part {
					if s == clean {
						part[i] = intended
					}
				}
			case 3:
				if snap != nil {
					m.adopt(snap)
				}
				snap, snapModel = m.snapshot(), slices.Clone(model)
			default:
				s := status(r.IntN(3))
				m.set(page, n, s)
				for i := range part {
					part[i] = s
				}
			}
			if !slices.Equal(model, statuses(m)) {
				t.Fatalf("the map of %d pages differs from the model", pages)
			}
			if snap != nil && !slices.Equal(snapModel, statuses(snap)) {
				t.Fatal("a snapshot has changed")
			}
			p, err := encodeState(&meta{Size: pages << 12, PageSize: 4096}, m)
			if err != nil {
				t.Fatal(err)
			}
			_, back, err := decodeState(p)
			if err != nil || !slices.Equal(model, statuses(back)) {
				t.Fatalf("a state does not survive encoding (%v)", err)
			}
		}
	}
}

func TestRandomPagesAreEncodedAsPlanes(t *testing.T) {
	r := testenv.Rand(t)
	m := newPageMap(leafPages + 100)
	for p := range m.pages {
		m.set(p, 1, status(r.IntN(4)))
	}
	p, err := encodeState(&meta{Size: m.pages << 12, PageSize: 4096}, m)
	if err != nil {
		t.Fatal(err)
	}
	if len(p) > planesSize+1000 {
		t.Errorf("%d bytes for one full leaf", len(p))
	}
	_, back, err := decodeState(p)
	if err != nil || !slices.Equal(statuses(m), statuses(back)) {
		t.Errorf("a state does not survive encoding (%v)", err)
	}
}

func TestHugeRegionIsSmall(t *testing.T) {
	const tib = 1 << 40
	m := newPageMap(tib >> 12)
	m.set(0, m.pages, clean)
	m.intend(12345, 1)
	p, err := encodeState(&meta{Size: tib, PageSize: 4096}, m)
	if err != nil || len(p) > 1000 {
		t.Errorf("a state of %d bytes, %v", len(p), err)
	}
	if got := testing.AllocsPerRun(10, func() { m.needsIntent(0, m.pages) }); got != 0 {
		t.Errorf("needsIntent allocates")
	}
}

func TestEveryBitOfTheStateCounts(t *testing.T) {
	m := newPageMap(5000)
	m.set(10, 100, clean)
	m.set(50, 3, dirty)
	p, err := encodeState(&meta{URL: "mem:", Size: 5000 << 12, PageSize: 4096}, m)
	if err != nil {
		t.Fatal(err)
	}
	for bit := range len(p) * 8 {
		q := bytes.Clone(p)
		q[bit/8] ^= 1 << (bit % 8)
		if _, _, err := decodeState(q); err == nil {
			t.Errorf("bit %d was turned without notice", bit)
		}
	}
	for n := range p {
		if _, _, err := decodeState(p[:n]); err == nil {
			t.Errorf("a cut to %d of %d bytes went without notice", n, len(p))
		}
	}
}

func FuzzState(f *testing.F) {
	for _, pages := range []int64{1, 70, leafPages + 5} {
		m := newPageMap(pages)
		m.set(0, pages, clean)
		m.set(pages/2, 1, dirty)
		p, _ := encodeState(&meta{URL: "mem:", Size: pages << 12, PageSize: 4096}, m)
		f.Add(p)
		f.Add(appendPages(nil, m))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		decodeState(p)
		// Past the checksum, which a fuzzer does not guess.
		if m, err := decodePages(p, 2*leafPages+9); err == nil {
			q := appendPages(nil, m)
			back, err := decodePages(q, m.pages)
			if err != nil || !slices.Equal(statuses(m), statuses(back)) {
				t.Fatalf("decoded pages don't survive encoding (%v)", err)
			}
		}
	})
}

func FuzzJournal(f *testing.F) {
	id := journalID{1, 2}
	p := id.encodeHeader()
	var ends []int
	for i, r := range []record{
		{kind: kindSession, payload: []byte("boot")},
		{kind: kindIntent, payload: encodeIntent(nil, 3, 4)},
		{kind: kindCommit, payload: encodeCommit(nil, nil)},
		{kind: kindGeneration, payload: encodeGeneration(nil, "x", true)},
		{kind: kindRemoteSession, payload: []byte("session")},
		{kind: kindSeal},
	} {
		r.seq = uint64(i + 1)
		p = appendRecord(p, id.seed(), r)
		ends = append(ends, len(p))
	}
	f.Add(p, []byte{}, byte(1))
	for _, end := range ends {
		f.Add(p[:end], encodeIntent(nil, 1, 1<<40), byte(kindIntent))
	}
	f.Fuzz(func(t *testing.T, p, payload []byte, k byte) {
		for _, boot := range []string{"this", "that"} {
			r := replay{meta: &meta{Boot: "this"}, pages: newPageMap(1000), boot: boot, open: true}
			r.journal(p, id)
			// A record whose checksums are right, with any content.
			r.apply(record{kind: kind(k), payload: payload})
			statuses(r.pages)
		}
	})
}
