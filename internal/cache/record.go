package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/memferry/memferry/internal/chunk"
)

// A journal is a file header followed by records. All integers are
// little-endian.
//
//	header:  magic[8] version u32, zero u32, cache id u64, number u64, crc u32, zero u32
//	record:  magic u16, kind u8, zero u8, length u32, sequence u64,
//	         durable u64, payload crc u32, header crc u32, payload
//
// Sequence numbers count from 1. The checksums are CRC-32C, begun with a value
// made of the cache's id and the journal's number, so that a block of another
// journal never passes for one of this. durable is the length of the journal
// that was known to be on the medium when the record was written: damage
// before it is damage, damage after it may be a crash of the machine.
const (
	journalMagic   = "MFJRNL\r\n"
	journalVersion = 1
	journalHeader  = 40
	recordMagic    = 0x4a4d
	recordHeader   = 32

	// maxPayload bounds a record. A larger commit becomes a checkpoint.
	maxPayload = 4 << 20
	// maxGeneration bounds the remote's tag, in bytes.
	maxGeneration = 4 << 10
)

type kind uint8

const (
	kindSession       kind = iota + 1 // boot id: the cache was opened
	kindIntent                        // page u64, n u64
	kindCommit                        // uvarints: count, then page, n and state of each
	kindGeneration                    // pushing u8, tag
	kindSeal                          // nothing: the next journal goes on
	kindRemoteSession                 // its name; not in a journal of a state of version 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// journalID binds records to their journal.
type journalID struct{ cache, number uint64 }

func (id journalID) seed() uint32 {
	var p [16]byte
	binary.LittleEndian.PutUint64(p[:8], id.cache)
	binary.LittleEndian.PutUint64(p[8:], id.number)
	return crc32.Checksum(p[:], castagnoli)
}

func (id journalID) encodeHeader() []byte {
	p := make([]byte, journalHeader)
	copy(p, journalMagic)
	binary.LittleEndian.PutUint32(p[8:], journalVersion)
	binary.LittleEndian.PutUint64(p[16:], id.cache)
	binary.LittleEndian.PutUint64(p[24:], id.number)
	binary.LittleEndian.PutUint32(p[32:], crc32.Checksum(p[:32], castagnoli))
	return p
}

// checkHeader validates the header of the journal that should be id.
func (id journalID) checkHeader(p []byte) error {
	if len(p) < journalHeader {
		return errors.New("too short")
	}
	want := id.encodeHeader()
	switch {
	case string(p[:8]) != journalMagic:
		return errors.New("bad magic number")
	case string(p[8:journalHeader]) != string(want[8:]):
		return errors.New("its header does not match")
	}
	return nil
}

// record is one entry of a journal.
type record struct {
	kind    kind
	seq     uint64
	durable int64
	payload []byte
}

func appendRecord(p []byte, seed uint32, r record) []byte {
	start := len(p)
	p = binary.LittleEndian.AppendUint16(p, recordMagic)
	p = append(p, byte(r.kind), 0)
	p = binary.LittleEndian.AppendUint32(p, uint32(len(r.payload)))
	p = binary.LittleEndian.AppendUint64(p, r.seq)
	p = binary.LittleEndian.AppendUint64(p, uint64(r.durable))
	p = binary.LittleEndian.AppendUint32(p, crc32.Update(seed, castagnoli, r.payload))
	p = binary.LittleEndian.AppendUint32(p, crc32.Update(seed, castagnoli, p[start:]))
	return append(p, r.payload...)
}

var (
	// errShort says that the file ends within the record, as an append that
	// was cut off leaves it.
	errShort = errors.New("incomplete record")
	// errDamaged says that a record is not what was written.
	errDamaged = errors.New("damaged record")
)

// decodeRecord reads the record at the start of p, and returns its length.
func decodeRecord(p []byte, seed uint32) (record, int64, error) {
	var r record
	if len(p) < recordHeader {
		return r, 0, errShort
	}
	h := p[:recordHeader]
	if binary.LittleEndian.Uint16(h) != recordMagic ||
		binary.LittleEndian.Uint32(h[28:]) != crc32.Update(seed, castagnoli, h[:28]) {
		return r, 0, errDamaged
	}
	n := int64(binary.LittleEndian.Uint32(h[4:]))
	if n > maxPayload || h[3] != 0 {
		return r, 0, errDamaged
	}
	if int64(len(p)) < recordHeader+n {
		return r, 0, errShort
	}
	r.kind = kind(h[2])
	r.seq = binary.LittleEndian.Uint64(h[8:])
	r.durable = int64(binary.LittleEndian.Uint64(h[16:]))
	r.payload = p[recordHeader : recordHeader+n]
	if binary.LittleEndian.Uint32(h[24:]) != crc32.Update(seed, castagnoli, r.payload) {
		return r, 0, errDamaged
	}
	return r, recordHeader + n, nil
}

// durableAfter looks for intact records in p, whatever is between them, and
// returns the largest durable length that one of them claims.
func durableAfter(p []byte, seed uint32) int64 {
	durable := int64(-1)
	for len(p) >= recordHeader {
		r, n, err := decodeRecord(p, seed)
		if err != nil {
			p = p[1:]
			continue
		}
		durable = max(durable, r.durable)
		p = p[n:]
	}
	return durable
}

func encodeIntent(p []byte, page, n int64) []byte {
	p = binary.LittleEndian.AppendUint64(p, uint64(page))
	return binary.LittleEndian.AppendUint64(p, uint64(n))
}

func decodeIntent(p []byte) (page, n int64, err error) {
	if len(p) != 16 {
		return 0, 0, fmt.Errorf("intent of %d bytes", len(p))
	}
	return int64(binary.LittleEndian.Uint64(p)), int64(binary.LittleEndian.Uint64(p[8:])), nil
}

func encodeCommit(p []byte, changes []chunk.Change) []byte {
	p = binary.AppendUvarint(p, uint64(len(changes)))
	for _, c := range changes {
		p = binary.AppendUvarint(p, uint64(c.Page))
		p = binary.AppendUvarint(p, uint64(c.N))
		p = append(p, byte(c.State))
	}
	return p
}

func decodeCommit(p []byte) ([]chunk.Change, error) {
	r := reader{p: p}
	n := r.uvarint()
	if n > uint64(len(p)) {
		return nil, fmt.Errorf("commit of %d changes in %d bytes", n, len(p))
	}
	changes := make([]chunk.Change, n)
	for i := range changes {
		changes[i] = chunk.Change{Page: int64(r.uvarint()), N: int64(r.uvarint()), State: chunk.PageState(r.byte())}
	}
	return changes, r.end()
}

func encodeGeneration(p []byte, gen string, pushing bool) []byte {
	b := byte(0)
	if pushing {
		b = 1
	}
	return append(append(p, b), gen...)
}

func decodeGeneration(p []byte) (gen string, pushing bool, err error) {
	if len(p) == 0 || len(p) > 1+maxGeneration || p[0] > 1 {
		return "", false, errors.New("bad generation")
	}
	return string(p[1:]), p[0] == 1, nil
}

// reader takes values from the front of p and remembers that there were none
// left.
type reader struct {
	p    []byte
	fail bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.p)
	if n <= 0 {
		r.fail, r.p = true, nil
		return 0
	}
	r.p = r.p[n:]
	return v
}

func (r *reader) byte() byte {
	b := r.bytes(1)
	if b == nil {
		return 0
	}
	return b[0]
}

func (r *reader) bytes(n int) []byte {
	if len(r.p) < n {
		r.fail, r.p = true, nil
		return nil
	}
	b := r.p[:n]
	r.p = r.p[n:]
	return b
}

// end returns an error unless exactly everything was taken.
func (r *reader) end() error {
	if r.fail {
		return errors.New("ends early")
	}
	if len(r.p) > 0 {
		return fmt.Errorf("%d bytes too many", len(r.p))
	}
	return nil
}
