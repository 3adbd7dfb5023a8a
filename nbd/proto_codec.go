package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// The codec works on byte slices: append… adds the wire form of a message to
// a slice, parse… takes it from one that holds at least the message's fixed
// length. Callers read lengths off the wire, check them against their limits,
// and only then take memory; nothing here allocates more than its input holds.

// errProtocol marks what a peer that keeps to the protocol never sends.
var errProtocol = errors.New("NBD protocol violation")

func protocolErrorf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errProtocol, fmt.Sprintf(format, args...))
}

var be = binary.BigEndian

// Fixed lengths on the wire, in bytes.
const (
	greetingLen          = 18 // two magics, handshake flags
	clientFlagsLen       = 4
	optionHeaderLen      = 16
	optionReplyHeaderLen = 20
	exportNameReplyLen   = 10  // without the zeroes
	exportNameZeroes     = 124 // reserved, unless NO_ZEROES
	requestLen           = 28
	simpleReplyLen       = 16
	chunkHeaderLen       = 20
	offsetDataLen        = 8 // before the data
	offsetHoleLen        = 12
	statusExtentLen      = 8
	errorChunkLen        = 6 // before the message
	infoExportLen        = 12
	infoBlockSizeLen     = 14
)

// checkString validates a string of the protocol ("Conventions").
func checkString(what, s string) error {
	switch {
	case len(s) > maxString:
		return protocolErrorf("%s of %d bytes, longest allowed is %d", what, len(s), maxString)
	case strings.IndexByte(s, 0) >= 0:
		return protocolErrorf("%s contains NUL", what)
	case !utf8.ValidString(s):
		return protocolErrorf("%s is not UTF-8", what)
	}
	return nil
}

// Handshake.

// appendGreeting adds what a newstyle server says first.
func appendGreeting(b []byte, flags uint16) []byte {
	b = be.AppendUint64(b, magicInit)
	b = be.AppendUint64(b, magicOption)
	return be.AppendUint16(b, flags)
}

// parseGreeting takes the greetingLen bytes that a newstyle server says first.
func parseGreeting(b []byte) (flags uint16, err error) {
	if be.Uint64(b) != magicInit {
		return 0, protocolErrorf("not an NBD server: greeting %q", b[:8])
	}
	switch m := be.Uint64(b[8:]); m {
	case magicOption:
		return be.Uint16(b[16:]), nil
	case magicOldstyle:
		return 0, protocolErrorf("server speaks only the oldstyle handshake")
	default:
		return 0, protocolErrorf("unknown handshake %#x", m)
	}
}

func appendClientFlags(b []byte, flags uint32) []byte { return be.AppendUint32(b, flags) }

func parseClientFlags(b []byte) uint32 { return be.Uint32(b) }

// optionHeader precedes the data of an option.
type optionHeader struct {
	option uint32
	length uint32 // of the data
}

func appendOptionHeader(b []byte, h optionHeader) []byte {
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint32(b, h.option)
	return be.AppendUint32(b, h.length)
}

// appendOption adds a whole option.
func appendOption(b []byte, option uint32, data []byte) []byte {
	b = appendOptionHeader(b, optionHeader{option, uint32(len(data))})
	return append(b, data...)
}

func parseOptionHeader(b []byte) (optionHeader, error) {
	if m := be.Uint64(b); m != magicOption {
		return optionHeader{}, protocolErrorf("option magic %#x", m)
	}
	return optionHeader{option: be.Uint32(b[8:]), length: be.Uint32(b[12:])}, nil
}

// optionReplyHeader precedes the data of one reply to an option.
type optionReplyHeader struct {
	option uint32
	typ    uint32 // rep…
	length uint32 // of the data
}

// isError reports whether the reply refuses the option.
func (h optionReplyHeader) isError() bool { return h.typ&repErrBit != 0 }

func appendOptionReplyHeader(b []byte, h optionReplyHeader) []byte {
	b = be.AppendUint64(b, magicOptionReply)
	b = be.AppendUint32(b, h.option)
	b = be.AppendUint32(b, h.typ)
	return be.AppendUint32(b, h.length)
}

// appendOptionReply adds a whole reply.
func appendOptionReply(b []byte, option, typ uint32, data []byte) []byte {
	b = appendOptionReplyHeader(b, optionReplyHeader{option, typ, uint32(len(data))})
	return append(b, data...)
}

func parseOptionReplyHeader(b []byte) (optionReplyHeader, error) {
	if m := be.Uint64(b); m != magicOptionReply {
		return optionReplyHeader{}, protocolErrorf("option reply magic %#x", m)
	}
	return optionReplyHeader{option: be.Uint32(b[8:]), typ: be.Uint32(b[12:]), length: be.Uint32(b[16:])}, nil
}

// exportNameReply answers EXPORT_NAME.
type exportNameReply struct {
	size  uint64
	flags TransmissionFlags
}

func appendExportNameReply(b []byte, r exportNameReply, noZeroes bool) []byte {
	b = be.AppendUint64(b, r.size)
	b = be.AppendUint16(b, uint16(r.flags))
	if !noZeroes {
		b = append(b, make([]byte, exportNameZeroes)...)
	}
	return b
}

func parseExportNameReply(b []byte) exportNameReply {
	return exportNameReply{size: be.Uint64(b), flags: TransmissionFlags(be.Uint16(b[8:]))}
}

// wireReader takes fields off a slice; after the first that does not fit, bad
// stays set and every field is zero.
type wireReader struct {
	b   []byte
	bad bool
}

func (r *wireReader) take(n uint64) []byte {
	if r.bad || n > uint64(len(r.b)) {
		r.bad = true
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *wireReader) uint16() uint16 {
	if p := r.take(2); p != nil {
		return be.Uint16(p)
	}
	return 0
}

func (r *wireReader) uint32() uint32 {
	if p := r.take(4); p != nil {
		return be.Uint32(p)
	}
	return 0
}

func (r *wireReader) uint64() uint64 {
	if p := r.take(8); p != nil {
		return be.Uint64(p)
	}
	return 0
}

// string takes a string with a 32-bit length in front.
func (r *wireReader) string() string { return string(r.take(uint64(r.uint32()))) }

func appendString(b []byte, s string) []byte {
	b = be.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// infoRequest is the data of INFO and GO.
type infoRequest struct {
	name  string
	infos []uint16 // infoType…
}

func appendInfoRequest(b []byte, r infoRequest) []byte {
	b = appendString(b, r.name)
	b = be.AppendUint16(b, uint16(len(r.infos)))
	for _, i := range r.infos {
		b = be.AppendUint16(b, i)
	}
	return b
}

func parseInfoRequest(b []byte) (infoRequest, error) {
	w := wireReader{b: b}
	r := infoRequest{name: w.string()}
	n := int(w.uint16())
	if w.bad || len(w.b) != 2*n {
		return infoRequest{}, protocolErrorf("INFO or GO with data of the wrong length")
	}
	for range n {
		r.infos = append(r.infos, w.uint16())
	}
	return r, checkString("export name", r.name)
}

// serverReply is the data of a repServer: one export of a list.
type serverReply struct {
	name, description string
}

func appendServerReply(b []byte, r serverReply) []byte {
	b = appendString(b, r.name)
	return append(b, r.description...)
}

func parseServerReply(b []byte) (serverReply, error) {
	w := wireReader{b: b}
	r := serverReply{name: w.string()}
	if w.bad {
		return serverReply{}, protocolErrorf("list reply with a name longer than itself")
	}
	r.description = string(w.b)
	if err := checkString("export name", r.name); err != nil {
		return serverReply{}, err
	}
	return r, checkString("export description", r.description)
}

// infoReplyType returns which information the data of a repInfo holds.
func infoReplyType(b []byte) (uint16, error) {
	if len(b) < 2 {
		return 0, protocolErrorf("information reply of %d bytes", len(b))
	}
	return be.Uint16(b), nil
}

func appendInfoExport(b []byte, r exportNameReply) []byte {
	b = be.AppendUint16(b, infoTypeExport)
	return appendExportNameReply(b, r, true)
}

func parseInfoExport(b []byte) (exportNameReply, error) {
	if len(b) != infoExportLen {
		return exportNameReply{}, protocolErrorf("export information of %d bytes", len(b))
	}
	return parseExportNameReply(b[2:]), nil
}

// appendInfoString adds a name or a description.
func appendInfoString(b []byte, typ uint16, s string) []byte {
	b = be.AppendUint16(b, typ)
	return append(b, s...)
}

func parseInfoString(b []byte) (string, error) {
	if len(b) < 2 {
		return "", protocolErrorf("information reply of %d bytes", len(b))
	}
	s := string(b[2:])
	return s, checkString("information", s)
}

// blockSizes are the constraints that a server puts on requests.
type blockSizes struct {
	minimum, preferred, maximum uint32
}

func (s blockSizes) valid() error {
	pow2 := func(n uint32) bool { return n != 0 && n&(n-1) == 0 }
	if !pow2(s.minimum) || s.minimum > maxMinBlock || !pow2(s.preferred) ||
		s.preferred < max(s.minimum, 512) || s.maximum < s.preferred {
		return protocolErrorf("block sizes %d, %d, %d", s.minimum, s.preferred, s.maximum)
	}
	return nil
}

func appendInfoBlockSize(b []byte, s blockSizes) []byte {
	b = be.AppendUint16(b, infoTypeBlockSize)
	b = be.AppendUint32(b, s.minimum)
	b = be.AppendUint32(b, s.preferred)
	return be.AppendUint32(b, s.maximum)
}

// parseInfoBlockSize does not judge the sizes: see valid.
func parseInfoBlockSize(b []byte) (blockSizes, error) {
	if len(b) != infoBlockSizeLen {
		return blockSizes{}, protocolErrorf("block size information of %d bytes", len(b))
	}
	return blockSizes{be.Uint32(b[2:]), be.Uint32(b[6:]), be.Uint32(b[10:])}, nil
}

// metaRequest is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
type metaRequest struct {
	export  string
	queries []string
}

func appendMetaRequest(b []byte, r metaRequest) []byte {
	b = appendString(b, r.export)
	b = be.AppendUint32(b, uint32(len(r.queries)))
	for _, q := range r.queries {
		b = appendString(b, q)
	}
	return b
}

// errTooMany is returned for a request with more queries than the limit.
var errTooMany = errors.New("too many metadata context queries")

func parseMetaRequest(b []byte, maxQueries int) (metaRequest, error) {
	w := wireReader{b: b}
	r := metaRequest{export: w.string()}
	n := w.uint32()
	if w.bad {
		return metaRequest{}, protocolErrorf("metadata context request of %d bytes", len(b))
	}
	if err := checkString("export name", r.export); err != nil {
		return metaRequest{}, err
	}
	// A query takes four bytes or more: an impossible count is malformed, one
	// that merely exceeds the limit is too big.
	if uint64(n)*4 > uint64(len(w.b)) {
		return metaRequest{}, protocolErrorf("%d queries in %d bytes", n, len(w.b))
	}
	if uint64(n) > uint64(maxQueries) {
		return metaRequest{}, errTooMany
	}
	for range n {
		q := w.string()
		if err := checkString("query", q); err != nil {
			return metaRequest{}, err
		}
		r.queries = append(r.queries, q)
	}
	if w.bad || len(w.b) != 0 {
		return metaRequest{}, protocolErrorf("metadata context request of the wrong length")
	}
	return r, nil
}

// metaReply is the data of a repMetaContext.
type metaReply struct {
	id   uint32
	name string
}

func appendMetaReply(b []byte, r metaReply) []byte {
	b = be.AppendUint32(b, r.id)
	return append(b, r.name...)
}

func parseMetaReply(b []byte) (metaReply, error) {
	if len(b) < 4 {
		return metaReply{}, protocolErrorf("metadata context reply of %d bytes", len(b))
	}
	r := metaReply{id: be.Uint32(b), name: string(b[4:])}
	return r, checkString("metadata context", r.name)
}

// Transmission.

// request is the header of a command.
type request struct {
	flags  uint16 // cmdFlag…
	typ    uint16 // cmd…
	cookie uint64
	offset uint64
	length uint32
}

func appendRequest(b []byte, r request) []byte {
	b = be.AppendUint32(b, magicRequest)
	b = be.AppendUint16(b, r.flags)
	b = be.AppendUint16(b, r.typ)
	b = be.AppendUint64(b, r.cookie)
	b = be.AppendUint64(b, r.offset)
	return be.AppendUint32(b, r.length)
}

func parseRequest(b []byte) (request, error) {
	_ = b[requestLen-1]
	if m := be.Uint32(b); m != magicRequest {
		return request{}, protocolErrorf("request magic %#x", m)
	}
	return request{
		flags: be.Uint16(b[4:]), typ: be.Uint16(b[6:]), cookie: be.Uint64(b[8:]),
		offset: be.Uint64(b[16:]), length: be.Uint32(b[24:]),
	}, nil
}

// simpleReply answers a request; the data of a successful READ follows.
type simpleReply struct {
	err    Errno
	cookie uint64
}

func appendSimpleReply(b []byte, r simpleReply) []byte {
	b = be.AppendUint32(b, magicSimpleReply)
	b = be.AppendUint32(b, uint32(r.err))
	return be.AppendUint64(b, r.cookie)
}

// parseSimpleReply takes simpleReplyLen bytes, magic included.
func parseSimpleReply(b []byte) (simpleReply, error) {
	if m := be.Uint32(b); m != magicSimpleReply {
		return simpleReply{}, protocolErrorf("reply magic %#x", m)
	}
	return simpleReply{err: Errno(be.Uint32(b[4:])), cookie: be.Uint64(b[8:])}, nil
}

// chunkHeader precedes the payload of one chunk of a structured reply.
type chunkHeader struct {
	flags  uint16 // replyFlag…
	typ    uint16 // chunk…
	cookie uint64
	length uint32 // of the payload
}

// isError reports whether the chunk carries an error.
func (h chunkHeader) isError() bool { return h.typ&chunkErrorBit != 0 }

// done reports whether the chunk ends its reply.
func (h chunkHeader) done() bool { return h.flags&replyFlagDone != 0 }

func appendChunkHeader(b []byte, h chunkHeader) []byte {
	b = be.AppendUint32(b, magicStructuredReply)
	b = be.AppendUint16(b, h.flags)
	b = be.AppendUint16(b, h.typ)
	b = be.AppendUint64(b, h.cookie)
	return be.AppendUint32(b, h.length)
}

// parseChunkHeader takes chunkHeaderLen bytes, magic included.
func parseChunkHeader(b []byte) (chunkHeader, error) {
	if m := be.Uint32(b); m != magicStructuredReply {
		return chunkHeader{}, protocolErrorf("reply magic %#x", m)
	}
	return chunkHeader{
		flags: be.Uint16(b[4:]), typ: be.Uint16(b[6:]),
		cookie: be.Uint64(b[8:]), length: be.Uint32(b[16:]),
	}, nil
}

// replyMagic returns the magic that b, of four bytes or more, starts with.
func replyMagic(b []byte) uint32 { return be.Uint32(b) }

// appendOffsetData adds the header of a chunk of n bytes of data, and the
// offset; the data follows.
func appendOffsetData(b []byte, flags uint16, cookie, offset uint64, n uint32) []byte {
	b = appendChunkHeader(b, chunkHeader{flags, chunkOffsetData, cookie, offsetDataLen + n})
	return be.AppendUint64(b, offset)
}

// parseOffsetData takes the offset in front of the data.
func parseOffsetData(b []byte) (offset uint64) { return be.Uint64(b) }

// appendOffsetHole adds a whole chunk that stands for n zero bytes.
func appendOffsetHole(b []byte, flags uint16, cookie, offset uint64, n uint32) []byte {
	b = appendChunkHeader(b, chunkHeader{flags, chunkOffsetHole, cookie, offsetHoleLen})
	b = be.AppendUint64(b, offset)
	return be.AppendUint32(b, n)
}

// parseOffsetHole takes the payload of a hole.
func parseOffsetHole(b []byte) (offset uint64, n uint32, err error) {
	if len(b) != offsetHoleLen {
		return 0, 0, protocolErrorf("hole chunk of %d bytes", len(b))
	}
	offset, n = be.Uint64(b), be.Uint32(b[8:])
	if n == 0 {
		return 0, 0, protocolErrorf("hole chunk for zero bytes")
	}
	return offset, n, nil
}

// statusExtent is one descriptor of a block status.
type statusExtent struct {
	length uint32
	status uint32 // state… in base:allocation
}

// appendBlockStatus adds a whole block status chunk.
func appendBlockStatus(b []byte, flags uint16, cookie uint64, contextID uint32, extents []statusExtent) []byte {
	b = appendChunkHeader(b, chunkHeader{flags, chunkBlockStatus, cookie, uint32(4 + statusExtentLen*len(extents))})
	b = be.AppendUint32(b, contextID)
	for _, e := range extents {
		b = be.AppendUint32(b, e.length)
		b = be.AppendUint32(b, e.status)
	}
	return b
}

// parseBlockStatus takes the payload of a block status chunk.
func parseBlockStatus(b []byte) (contextID uint32, extents []statusExtent, err error) {
	n := len(b) - 4
	if n <= 0 || n%statusExtentLen != 0 || n/statusExtentLen > maxStatusExtents {
		return 0, nil, protocolErrorf("block status chunk of %d bytes", len(b))
	}
	extents = make([]statusExtent, 0, n/statusExtentLen)
	for p := b[4:]; len(p) > 0; p = p[statusExtentLen:] {
		e := statusExtent{length: be.Uint32(p), status: be.Uint32(p[4:])}
		if e.length == 0 {
			return 0, nil, protocolErrorf("block status extent of zero bytes")
		}
		extents = append(extents, e)
	}
	return be.Uint32(b), extents, nil
}

// appendErrorChunk adds a whole error chunk, the last of its reply. Longer
// messages than the protocol allows are cut.
func appendErrorChunk(b []byte, cookie uint64, e Errno, message string) []byte {
	message = cutString(message, maxString)
	b = appendChunkHeader(b, chunkHeader{replyFlagDone, chunkError, cookie, uint32(errorChunkLen + len(message))})
	b = be.AppendUint32(b, uint32(e))
	b = be.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}

// errorChunk is the payload of any error chunk.
type errorChunk struct {
	err     Errno
	message string
	offset  uint64 // of chunkErrorOffset only
}

// parseErrorChunk takes the payload of an error chunk of type typ; fields
// after the message of a type it does not know are ignored.
func parseErrorChunk(typ uint16, b []byte) (errorChunk, error) {
	w := wireReader{b: b}
	c := errorChunk{err: Errno(w.uint32())}
	c.message = string(w.take(uint64(w.uint16())))
	if typ == chunkErrorOffset {
		c.offset = w.uint64()
	}
	if w.bad {
		return errorChunk{}, protocolErrorf("error chunk of %d bytes", len(b))
	}
	return c, checkString("error message", c.message)
}

// cutString shortens s to at most n bytes, at a code point.
func cutString(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
