package nbd

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/memferry/memferry"
)

var cmpAll = cmp.AllowUnexported(infoRequest{}, metaRequest{}, request{}, chunkHeader{}, statusExtent{},
	optionHeader{}, optionReplyHeader{}, exportNameReply{}, blockSizes{}, serverReply{}, metaReply{},
	simpleReply{}, errorChunk{})

func roundTrip[T any](t *testing.T, name string, in T, enc func([]byte, T) []byte, dec func([]byte) (T, error)) {
	t.Helper()
	prefix := []byte("prefix")
	b := enc(prefix, in)
	if string(b[:len(prefix)]) != "prefix" {
		t.Errorf("%s: append replaced what was there", name)
	}
	out, err := dec(b[len(prefix):])
	if err != nil {
		t.Errorf("%s: %v", name, err)
	}
	if d := cmp.Diff(in, out, cmpAll); d != "" {
		t.Errorf("%s: (-in +out)\n%s", name, d)
	}
}

func TestCodecRoundTrips(t *testing.T) {
	roundTrip(t, "option header", optionHeader{optGo, 77}, appendOptionHeader, parseOptionHeader)
	roundTrip(t, "option reply header", optionReplyHeader{optGo, repErrUnknown, 3}, appendOptionReplyHeader, parseOptionReplyHeader)
	roundTrip(t, "info request", infoRequest{"disk", []uint16{3, 1, 900}}, appendInfoRequest, parseInfoRequest)
	roundTrip(t, "info request, default export", infoRequest{}, appendInfoRequest, parseInfoRequest)
	roundTrip(t, "server reply", serverReply{"a", "the first"}, appendServerReply, parseServerReply)
	roundTrip(t, "info export", exportNameReply{1 << 40, FlagHasFlags | FlagSendTrim}, appendInfoExport, parseInfoExport)
	roundTrip(t, "block sizes", blockSizes{1, 4096, 1 << 25}, appendInfoBlockSize, parseInfoBlockSize)
	roundTrip(t, "meta request", metaRequest{"x", []string{contextBase, "qemu:"}}, appendMetaRequest,
		func(b []byte) (metaRequest, error) { return parseMetaRequest(b, 2) })
	roundTrip(t, "meta reply", metaReply{9, contextBase}, appendMetaReply, parseMetaReply)
	roundTrip(t, "request", request{cmdFlagFUA, cmdWrite, 1<<63 + 5, 1 << 62, 4096}, appendRequest, parseRequest)
	roundTrip(t, "simple reply", simpleReply{EIO, 42}, appendSimpleReply, parseSimpleReply)
	roundTrip(t, "chunk header", chunkHeader{replyFlagDone, chunkOffsetData, 42, 12}, appendChunkHeader, parseChunkHeader)
	roundTrip(t, "error", errorChunk{err: ENOSPC, message: "full"}, func(b []byte, c errorChunk) []byte {
		return appendErrorChunk(b, 1, c.err, c.message)
	}, func(b []byte) (errorChunk, error) { return parseErrorChunk(chunkError, b[chunkHeaderLen:]) })
	roundTrip(t, "extents", []statusExtent{{4096, stateHole | stateZero}, {512, 0}}, func(b []byte, e []statusExtent) []byte {
		return appendBlockStatus(b, 0, 1, 7, e)
	}, func(b []byte) ([]statusExtent, error) {
		id, e, err := parseBlockStatus(b[chunkHeaderLen:])
		if id != 7 {
			t.Errorf("context ID %d, want 7", id)
		}
		return e, err
	})
}

func TestMessagesHaveTheirFixedLength(t *testing.T) {
	for name, c := range map[string]struct {
		b    []byte
		want int
	}{
		"greeting":     {appendGreeting(nil, 3), greetingLen},
		"client flags": {appendClientFlags(nil, 3), clientFlagsLen},
		"option":       {appendOptionHeader(nil, optionHeader{}), optionHeaderLen},
		"option reply": {appendOptionReplyHeader(nil, optionReplyHeader{}), optionReplyHeaderLen},
		"export name":  {appendExportNameReply(nil, exportNameReply{}, true), exportNameReplyLen},
		"with zeroes":  {appendExportNameReply(nil, exportNameReply{}, false), exportNameReplyLen + exportNameZeroes},
		"request":      {appendRequest(nil, request{}), requestLen},
		"simple reply": {appendSimpleReply(nil, simpleReply{}), simpleReplyLen},
		"chunk":        {appendChunkHeader(nil, chunkHeader{}), chunkHeaderLen},
		"data":         {appendOffsetData(nil, 0, 0, 0, 1), chunkHeaderLen + offsetDataLen},
		"hole":         {appendOffsetHole(nil, 0, 0, 0, 1), chunkHeaderLen + offsetHoleLen},
		"error":        {appendErrorChunk(nil, 0, EIO, ""), chunkHeaderLen + errorChunkLen},
		"info export":  {appendInfoExport(nil, exportNameReply{}), infoExportLen},
		"block sizes":  {appendInfoBlockSize(nil, blockSizes{}), infoBlockSizeLen},
	} {
		if len(c.b) != c.want {
			t.Errorf("%s: %d bytes, want %d", name, len(c.b), c.want)
		}
	}
}

func TestGreeting(t *testing.T) {
	if f, err := parseGreeting(appendGreeting(nil, flagFixedNewstyle)); err != nil || f != flagFixedNewstyle {
		t.Errorf("flags %d, error %v", f, err)
	}
	oldstyle := be.AppendUint64(be.AppendUint64(nil, magicInit), magicOldstyle)
	for name, b := range map[string][]byte{
		"http":     []byte("HTTP/1.1 400 Bad Request\r\n"),
		"oldstyle": append(oldstyle, 0, 0),
		"zeroes":   make([]byte, greetingLen),
	} {
		if _, err := parseGreeting(b); !errors.Is(err, errProtocol) {
			t.Errorf("%s: error %v, want a protocol violation", name, err)
		}
	}
}

func TestMalformedMessages(t *testing.T) {
	long := strings.Repeat("x", maxString+1)
	info := func(b []byte) error { _, err := parseInfoRequest(b); return err }
	meta := func(b []byte) error { _, err := parseMetaRequest(b, 4); return err }
	status := func(b []byte) error { _, _, err := parseBlockStatus(b); return err }
	hole := func(b []byte) error { _, _, err := parseOffsetHole(b); return err }
	chunkErr := func(b []byte) error { _, err := parseErrorChunk(chunkErrorOffset, b); return err }
	server := func(b []byte) error { _, err := parseServerReply(b); return err }
	for name, c := range map[string]struct {
		parse func([]byte) error
		b     []byte
	}{
		"info: empty":               {info, nil},
		"info: name past the end":   {info, []byte{0, 0, 0, 9, 'a', 0, 0}},
		"info: huge name":           {info, []byte{255, 255, 255, 255, 0, 0}},
		"info: missing infos":       {info, []byte{0, 0, 0, 1, 'a', 0, 2, 0, 1}},
		"info: trailing bytes":      {info, append(appendInfoRequest(nil, infoRequest{name: "a"}), 1)},
		"info: NUL in the name":     {info, appendInfoRequest(nil, infoRequest{name: "a\x00b"})},
		"info: name not UTF-8":      {info, appendInfoRequest(nil, infoRequest{name: "\xff"})},
		"info: long name":           {info, appendInfoRequest(nil, infoRequest{name: long})},
		"meta: empty":               {meta, nil},
		"meta: impossible count":    {meta, []byte{0, 0, 0, 0, 255, 255, 255, 255}},
		"meta: query past the end":  {meta, []byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 'b'}},
		"meta: trailing bytes":      {meta, append(appendMetaRequest(nil, metaRequest{}), 0)},
		"meta: long query":          {meta, appendMetaRequest(nil, metaRequest{queries: []string{long}})},
		"status: empty":             {status, []byte{0, 0, 0, 1}},
		"status: half an extent":    {status, make([]byte, 4+12)},
		"status: extent of nothing": {status, make([]byte, 4+8)},
		"hole: of nothing":          {hole, make([]byte, offsetHoleLen)},
		"hole: short":               {hole, make([]byte, 8)},
		"error: long message":       {chunkErr, []byte{0, 0, 0, 5, 0, 9, 'x'}},
		"error: no offset":          {chunkErr, []byte{0, 0, 0, 5, 0, 1, 'x'}},
		"list: name past the end":   {server, []byte{0, 0, 0, 2, 'x'}},
	} {
		if err := c.parse(c.b); !errors.Is(err, errProtocol) {
			t.Errorf("%s: error %v, want a protocol violation", name, err)
		}
	}
	five := appendMetaRequest(nil, metaRequest{queries: make([]string, 5)})
	if err := meta(five); !errors.Is(err, errTooMany) {
		t.Errorf("five queries where four are allowed: error %v", err)
	}
}

func TestBlockSizesValid(t *testing.T) {
	for _, c := range []struct {
		s  blockSizes
		ok bool
	}{
		{blockSizes{1, 512, 512}, true},
		{blockSizes{4096, 4096, 0xffffffff}, true},
		{blockSizes{0, 4096, 1 << 20}, false},
		{blockSizes{3, 4096, 1 << 20}, false},
		{blockSizes{1 << 17, 1 << 17, 1 << 20}, false},
		{blockSizes{4096, 512, 1 << 20}, false},
		{blockSizes{1, 256, 1 << 20}, false},
		{blockSizes{1, 4096, 1024}, false},
	} {
		if err := c.s.valid(); (err == nil) != c.ok {
			t.Errorf("%+v: error %v", c.s, err)
		}
	}
}

func TestErrnoMatchesErrors(t *testing.T) {
	for e, want := range map[Errno]error{
		EPERM: memferry.ErrReadOnly, ENOSPC: memferry.ErrNoSpace, ENOTSUP: memferry.ErrNotSupported,
	} {
		if !errors.Is(e, want) {
			t.Errorf("%v does not match %v", e, want)
		}
	}
	if errors.Is(EIO, memferry.ErrReadOnly) {
		t.Error("EIO matches ErrReadOnly")
	}
}

func TestErrorMessageIsCutAtACodePoint(t *testing.T) {
	b := appendErrorChunk(nil, 1, EIO, strings.Repeat("é", maxString))
	c, err := parseErrorChunk(chunkError, b[chunkHeaderLen:])
	if err != nil || len(c.message) != maxString {
		t.Errorf("%d bytes, error %v", len(c.message), err)
	}
}
