package cache

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/cespare/xxhash/v2"

	"github.com/memferry/memferry"
)

// The state file is a header, a JSON object (readable with a pager), and the
// status of all pages:
//
//	magic[8], version u32, JSON length u32, pages length u64, xxhash64 u64
//
// The checksum is that of the whole file with its own field zero. Version 1 had
// no session with the remote; it is read, and replaced at once.
const (
	stateMagic   = "MFCACHE\n"
	stateVersion = 2
	stateHeader  = 32
	// maxStateJSON bounds the JSON object, of which the URL is the largest.
	maxStateJSON = 64 << 10
)

// meta is what a state says besides the status of pages.
type meta struct {
	URL        string `json:"url"` // without credentials
	Size       int64  `json:"size"`
	PageSize   int64  `json:"page_size"`
	Generation string `json:"generation,omitempty"`
	Pushing    bool   `json:"pushing,omitempty"` // the generation may be behind
	Cache      uint64 `json:"cache"`             // random
	Journal    uint64 `json:"journal"`           // number of the first one to replay
	Boot       string `json:"boot"`              // boot id of the last session
	Clean      bool   `json:"clean"`             // which was closed in order

	// RemoteSession is the one in whose name the remote was last written to.
	RemoteSession string `json:"remote_session,omitempty"`

	version uint32 // of the file that this was read from
}

func (m *meta) pages() int64 { return (m.Size + memferry.PageSize - 1) / memferry.PageSize }

// Items of the page list: the status of one leaf after the other.
const (
	// 0 to 3: a number of leaves that have this status throughout
	itemRuns   = 4 // uvarint count, then n<<2 | status for each run
	itemPlanes = 5 // lo and hi as they are
)

const planesSize = 2 * 8 * leafWords

func encodeState(m *meta, pages *pageMap) ([]byte, error) {
	j, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode state: %w", err)
	}
	if len(j) > maxStateJSON {
		return nil, fmt.Errorf("encode state: description of %d bytes, limit %d", len(j), maxStateJSON)
	}
	p := make([]byte, stateHeader, stateHeader+len(j)+4096)
	p = append(p, j...)
	p = appendPages(p, pages)
	copy(p, stateMagic)
	binary.LittleEndian.PutUint32(p[8:], stateVersion)
	binary.LittleEndian.PutUint32(p[12:], uint32(len(j)))
	binary.LittleEndian.PutUint64(p[16:], uint64(len(p)-stateHeader-len(j)))
	binary.LittleEndian.PutUint64(p[24:], xxhash.Sum64(p))
	return p, nil
}

func appendPages(p []byte, m *pageMap) []byte {
	var last status
	same := uint64(0) // leaves that have status last throughout, not written yet
	flush := func() {
		if same > 0 {
			p = binary.AppendUvarint(append(p, byte(last)), same)
		}
		same = 0
	}
	for i := range m.leaves {
		n := min(leafPages, m.pages-int64(i)*leafPages)
		l := m.leaves[i].Load()
		if s := l.get(0); l.runEnd(0, s) >= n {
			if s != last {
				flush()
			}
			last = s
			same++
			continue
		}
		flush()
		p = appendLeaf(p, l, n)
	}
	flush()
	return p
}

// appendLeaf encodes a leaf of n pages by runs, or as it is where that is
// shorter.
func appendLeaf(p []byte, l *leaf, n int64) []byte {
	var runs []byte
	count := uint64(0)
	l.runs(n, func(_, n int64, s status) error { //nolint:errcheck // ends early, on purpose
		count++
		runs = binary.AppendUvarint(runs, uint64(n)<<2|uint64(s))
		if len(runs) >= planesSize {
			return errDamaged
		}
		return nil
	})
	if len(runs) < planesSize {
		return append(binary.AppendUvarint(append(p, itemRuns), count), runs...)
	}
	p = append(p, itemPlanes)
	for w := range leafWords {
		p = binary.LittleEndian.AppendUint64(p, l.lo[w].Load())
	}
	for w := range leafWords {
		p = binary.LittleEndian.AppendUint64(p, l.hi[w].Load())
	}
	return p
}

func decodeState(p []byte) (*meta, *pageMap, error) {
	if len(p) < stateHeader || string(p[:8]) != stateMagic {
		return nil, nil, errors.New("not a state file")
	}
	version := binary.LittleEndian.Uint32(p[8:])
	if version < 1 || version > stateVersion {
		return nil, nil, fmt.Errorf("format version %d, this program knows those up to %d", version, stateVersion)
	}
	nj, np := uint64(binary.LittleEndian.Uint32(p[12:])), binary.LittleEndian.Uint64(p[16:])
	if nj > maxStateJSON || np != uint64(len(p)-stateHeader)-nj {
		return nil, nil, fmt.Errorf("%d bytes long, not as its header says", len(p))
	}
	var h xxhash.Digest
	h.Reset()
	h.Write(p[:24])          //nolint:errcheck // never fails
	h.Write(make([]byte, 8)) //nolint:errcheck // never fails
	h.Write(p[stateHeader:]) //nolint:errcheck // never fails
	if h.Sum64() != binary.LittleEndian.Uint64(p[24:]) {
		return nil, nil, errors.New("checksum mismatch")
	}
	var m meta
	if err := json.Unmarshal(p[stateHeader:stateHeader+nj], &m); err != nil {
		return nil, nil, err
	}
	m.version = version
	if m.Size <= 0 || m.Size > MaxSize || m.PageSize != memferry.PageSize {
		return nil, nil, fmt.Errorf("size %d, page size %d", m.Size, m.PageSize)
	}
	pages, err := decodePages(p[stateHeader+nj:], m.pages())
	if err != nil {
		return nil, nil, fmt.Errorf("pages: %w", err)
	}
	return &m, pages, nil
}

func decodePages(p []byte, n int64) (*pageMap, error) {
	m := newPageMap(n)
	r := reader{p: p}
	for i := int64(0); i < int64(len(m.leaves)); {
		first := i * leafPages
		switch item := r.byte(); {
		case r.fail:
			return nil, r.end()
		case item <= byte(intended):
			same := r.uvarint()
			if same == 0 || same > uint64(int64(len(m.leaves))-i) {
				return nil, fmt.Errorf("%d leaves at %d", same, i)
			}
			i += int64(same)
			m.set(first, min(i*leafPages, n)-first, status(item))
		case item == itemRuns:
			if err := m.decodeRuns(&r, first, min(leafPages, n-first)); err != nil {
				return nil, err
			}
			i++
		case item == itemPlanes:
			if err := m.decodePlanes(&r, i); err != nil {
				return nil, err
			}
			i++
		default:
			return nil, fmt.Errorf("item %d", item)
		}
	}
	return m, r.end()
}

func (m *pageMap) decodeRuns(r *reader, page, n int64) error {
	for range r.uvarint() {
		v := r.uvarint()
		k := int64(v >> 2)
		if r.fail || k == 0 || k > n {
			return fmt.Errorf("run of %d pages at %d", k, page)
		}
		m.set(page, k, status(v&3))
		page, n = page+k, n-k
	}
	if n != 0 {
		return fmt.Errorf("%d pages missing at %d", n, page)
	}
	return nil
}

func (m *pageMap) decodePlanes(r *reader, i int64) error {
	p := r.bytes(planesSize)
	if p == nil {
		return r.end()
	}
	l := m.own(i)
	n := m.pages - i*leafPages
	for w := range int64(leafWords) {
		lo, hi := binary.LittleEndian.Uint64(p[8*w:]), binary.LittleEndian.Uint64(p[8*(leafWords+w):])
		if (lo|hi)&^mask(0, n-64*w) != 0 {
			return fmt.Errorf("status past the last page")
		}
		l.lo[w].Store(lo)
		l.hi[w].Store(hi)
	}
	return nil
}
