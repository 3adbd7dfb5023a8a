package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/testenv"
)

const testSize = 1 << 20

// Handshake.

func TestGreetingAndAbort(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Backend: newPlain(testSize)})
	w := connect(t, s).hello()
	if typ := w.final(optAbort, []byte("data is ignored")); typ != repAck {
		t.Errorf("ABORT: reply %#x", typ)
	}
	if err := w.ends(); err != nil {
		t.Errorf("after ABORT: %v", err)
	}
}

func TestUnknownClientFlagsEndTheConnection(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Backend: newPlain(testSize)})
	w := connect(t, s)
	w.read(greetingLen)
	w.write(appendClientFlags(nil, 1<<5|flagClientFixedNewstyle))
	if err := w.ends(); !errors.Is(err, errProtocol) {
		t.Errorf("error %v", err)
	}
}

func TestExportName(t *testing.T) {
	for _, c := range []struct {
		flags  uint32
		zeroes int
	}{
		{flagClientFixedNewstyle, exportNameZeroes},
		{flagClientFixedNewstyle | flagClientNoZeroes, 0},
		{0, exportNameZeroes}, // newstyle that is not fixed
	} {
		t.Run(fmt.Sprintf("flags %d", c.flags), func(t *testing.T) {
			s := startServer(t, ServerOptions{}, Export{Name: "disk", Backend: newAble(testSize)})
			w := connect(t, s)
			w.read(greetingLen)
			w.write(appendClientFlags(nil, c.flags))
			w.write(appendOption(nil, optExportName, []byte("disk")))
			r := parseExportNameReply(w.read(exportNameReplyLen))
			if r.size != testSize {
				t.Errorf("size %d", r.size)
			}
			if !bytes.Equal(w.read(c.zeroes), make([]byte, c.zeroes)) {
				t.Error("reserved bytes are not zero")
			}
			if a := w.ask(request{typ: cmdRead, length: 512}); a.errno != 0 || !a.simple || len(a.data) != 512 {
				t.Errorf("read: %+v", a.errno)
			}
			w.disconnect()
		})
	}
}

func TestExportNameUnknownEndsTheConnection(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "disk", Backend: newPlain(testSize)})
	w := connect(t, s).hello()
	w.write(appendOption(nil, optExportName, []byte("other")))
	if err := w.ends(); err == nil {
		t.Error("no error")
	}
}

func TestList(t *testing.T) {
	s := startServer(t, ServerOptions{},
		Export{Name: "b", Backend: newPlain(testSize)},
		Export{Name: "a", Description: "the first", Backend: newPlain(testSize)})
	w := connect(t, s).hello()
	var got []serverReply
	for _, r := range w.option(optList, nil) {
		if r.typ == repServer {
			e, err := parseServerReply(r.data)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e)
		}
	}
	if d := cmp.Diff([]serverReply{{"a", "the first"}, {"b", ""}}, got, cmpAll); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if typ := w.final(optList, []byte{1}); typ != repErrInvalid {
		t.Errorf("LIST with data: reply %#x", typ)
	}
}

func TestInfoAndGo(t *testing.T) {
	s := startServer(t, ServerOptions{MaxRequest: 1 << 20},
		Export{Name: "disk", Description: "a disk", Backend: newAble(testSize)})
	w := connect(t, s).hello()
	ask := appendInfoRequest(nil, infoRequest{"disk", []uint16{infoTypeName, infoTypeDescription, infoTypeBlockSize, 77}})
	for _, option := range []uint32{optInfo, optGo} {
		got := map[uint16][]byte{}
		replies := w.option(option, ask)
		for _, r := range replies[:len(replies)-1] {
			typ, err := infoReplyType(r.data)
			if err != nil || r.typ != repInfo {
				t.Fatalf("reply %#x, error %v", r.typ, err)
			}
			got[typ] = r.data
		}
		e, err := parseInfoExport(got[infoTypeExport])
		wantFlags := FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagSendTrim | FlagSendWriteZeroes | FlagSendFastZero | FlagCanMultiConn
		if err != nil || e.size != testSize || e.flags != wantFlags {
			t.Errorf("%s: export %+v, error %v", optionName(option), e, err)
		}
		if s, err := parseInfoString(got[infoTypeName]); err != nil || s != "disk" {
			t.Errorf("name %q, error %v", s, err)
		}
		if s, err := parseInfoString(got[infoTypeDescription]); err != nil || s != "a disk" {
			t.Errorf("description %q, error %v", s, err)
		}
		if b, err := parseInfoBlockSize(got[infoTypeBlockSize]); err != nil || b != (blockSizes{1, 4096, 1 << 20}) {
			t.Errorf("block sizes %v, error %v", b, err)
		}
	}
	w.disconnect()
}

func TestOptionsThatAreRefused(t *testing.T) {
	o := ServerOptions{MaxExportNameLength: 64, MaxOptionLength: 4096, MaxMetaContexts: 2}
	s := startServer(t, o, Export{Name: "disk", Backend: newAble(testSize)})
	w := connect(t, s).hello()
	meta := func(queries ...string) []byte { return appendMetaRequest(nil, metaRequest{"disk", queries}) }
	for _, c := range []struct {
		name   string
		option uint32
		data   []byte
		want   uint32
	}{
		{"unknown", 4711, []byte("whatever"), repErrUnsup},
		{"peek", 4, nil, repErrUnsup},
		{"TLS", optStartTLS, nil, repErrUnsup},
		{"extended headers", optExtendedHeaders, nil, repErrUnsup},
		{"info, no such export", optInfo, appendInfoRequest(nil, infoRequest{name: "other"}), repErrUnknown},
		{"go, no such export", optGo, appendInfoRequest(nil, infoRequest{name: "other"}), repErrUnknown},
		{"go, empty", optGo, nil, repErrInvalid},
		{"go, name past the end", optGo, []byte{0, 0, 1, 0, 'x', 0, 0}, repErrInvalid},
		{"go, name too long", optGo, appendInfoRequest(nil, infoRequest{name: strings.Repeat("x", 65)}), repErrInvalid},
		{"go, NUL", optGo, appendInfoRequest(nil, infoRequest{name: "disk\x00"}), repErrInvalid},
		{"data too long", optGo, make([]byte, 4097), repErrTooBig},
		{"meta without structured replies", optSetMetaContext, meta(contextBase), repErrInvalid},
		{"structured reply with data", optStructuredReply, []byte{1}, repErrInvalid},
		{"structured reply", optStructuredReply, nil, repAck},
		{"meta, no such export", optListMetaContext, appendMetaRequest(nil, metaRequest{export: "other"}), repErrUnknown},
		{"meta, empty", optSetMetaContext, nil, repErrInvalid},
		{"meta, too many queries", optSetMetaContext, meta("a:", "b:", "c:"), repErrTooBig},
		{"meta, query past the end", optSetMetaContext, append(meta(), 9), repErrInvalid},
		{"still in step", optGo, appendInfoRequest(nil, infoRequest{name: "disk"}), repAck},
	} {
		if typ := w.final(c.option, c.data); typ != c.want {
			t.Errorf("%s: reply %#x, want %#x", c.name, typ, c.want)
		}
	}
	w.disconnect()
}

func TestDefaultExport(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "only", Backend: newPlain(testSize)})
	w := connect(t, s).hello()
	empty := appendInfoRequest(nil, infoRequest{infos: []uint16{infoTypeName}})
	replies := w.option(optInfo, empty)
	if len(replies) != 3 {
		t.Fatalf("%d replies", len(replies))
	}
	if name, err := parseInfoString(replies[1].data); err != nil || name != "only" {
		t.Errorf("canonical name %q, error %v", name, err)
	}
	if err := s.Add(Export{Name: "second", Backend: newPlain(testSize)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(Export{Name: "another", Backend: newPlain(testSize)}); err != nil {
		t.Fatal(err)
	}
	defaultIs := func(want string) {
		t.Helper()
		replies := w.option(optInfo, empty)
		if len(replies) != 3 {
			t.Fatalf("%d replies", len(replies))
		}
		if name, err := parseInfoString(replies[1].data); err != nil || name != want {
			t.Errorf("the default export is %q, error %v, want %q", name, err, want)
		}
	}
	defaultIs("only")
	s.Remove("only")
	defaultIs("second")
	s.Remove("second")
	s.Remove("another")
	if typ := w.final(optInfo, empty); typ != repErrUnknown {
		t.Errorf("without exports: reply %#x", typ)
	}
}

func TestMetaContexts(t *testing.T) {
	const gen = contextGeneration + "g1"
	s := startServer(t, ServerOptions{},
		Export{Name: "able", Backend: newAble(testSize)}, Export{Name: "plain", Backend: newPlain(testSize)})
	w := connect(t, s).hello()
	w.final(optStructuredReply, nil)
	for _, c := range []struct {
		option  uint32
		export  string
		queries []string
		want    []metaReply
	}{
		{optListMetaContext, "able", nil, []metaReply{{0, contextBase}, {0, gen}}},
		{optListMetaContext, "able", []string{"base:"}, []metaReply{{0, contextBase}}},
		{optListMetaContext, "able", []string{"x-memferry:"}, []metaReply{{0, gen}}},
		{optListMetaContext, "able", []string{contextGeneration}, []metaReply{{0, gen}}},
		{optListMetaContext, "able", []string{"qemu:", "nocolon"}, nil},
		{optListMetaContext, "plain", nil, nil},
		{optSetMetaContext, "able", nil, nil},
		{optSetMetaContext, "able", []string{"base:"}, nil},
		{optSetMetaContext, "able", []string{"base:other", "qemu:dirty-bitmap:x"}, nil},
		{optSetMetaContext, "able", []string{contextBase, contextBase}, []metaReply{{1, contextBase}}},
		{optSetMetaContext, "able", []string{contextGeneration}, []metaReply{{1, gen}}},
		{optSetMetaContext, "able", []string{gen}, []metaReply{{1, gen}}},
		{optSetMetaContext, "able", []string{contextGeneration + "g0"}, nil},
		{optSetMetaContext, "able", []string{"x-memferry:"}, nil},
		{optSetMetaContext, "able", []string{contextGeneration, contextBase}, []metaReply{{1, contextBase}, {2, gen}}},
		{optSetMetaContext, "plain", []string{contextBase, contextGeneration}, nil},
	} {
		replies := w.option(c.option, appendMetaRequest(nil, metaRequest{c.export, c.queries}))
		var got []metaReply
		for _, r := range replies[:len(replies)-1] {
			m, err := parseMetaReply(r.data)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, m)
		}
		if d := cmp.Diff(c.want, got, cmpAll); d != "" {
			t.Errorf("%s of %s, %q (-want +got)\n%s", optionName(c.option), c.export, c.queries, d)
		}
	}
}

func TestMetaContextOfAnotherExportIsNotSelected(t *testing.T) {
	s := startServer(t, ServerOptions{},
		Export{Name: "a", Backend: newAble(testSize)}, Export{Name: "b", Backend: newAble(testSize)})
	w := connect(t, s).hello()
	w.final(optStructuredReply, nil)
	w.final(optSetMetaContext, appendMetaRequest(nil, metaRequest{"a", []string{contextBase}}))
	w.final(optGo, appendInfoRequest(nil, infoRequest{name: "b"}))
	if a := w.ask(request{typ: cmdBlockStatus, length: 4096}); a.errno != EINVAL {
		t.Errorf("BLOCK_STATUS: %v", a.errno)
	}
}

func TestFailedSetMetaContextClearsContexts(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "a", Backend: newAble(testSize)})
	w := connect(t, s).hello()
	w.final(optStructuredReply, nil)
	w.final(optSetMetaContext, appendMetaRequest(nil, metaRequest{"a", []string{contextBase}}))
	w.final(optSetMetaContext, []byte{1})
	w.final(optGo, appendInfoRequest(nil, infoRequest{name: "a"}))
	if a := w.ask(request{typ: cmdBlockStatus, length: 4096}); a.errno != EINVAL {
		t.Errorf("BLOCK_STATUS: %v", a.errno)
	}
}

// sized is plain with constraints.
type sized struct {
	*plain
	sizes memferry.BlockSizes
}

func (s sized) BlockSizes() memferry.BlockSizes { return s.sizes }

func TestBlockSizesAdvertised(t *testing.T) {
	for _, c := range []struct {
		in   memferry.BlockSizes
		want blockSizes
	}{
		{memferry.BlockSizes{}, blockSizes{1, 4096, DefaultMaxRequest}},
		{memferry.BlockSizes{Min: 512, Preferred: 64 << 10, Max: 1 << 20}, blockSizes{512, 64 << 10, 1 << 20}},
		{memferry.BlockSizes{Preferred: 100_000}, blockSizes{1, 64 << 10, DefaultMaxRequest}},
		{memferry.BlockSizes{Preferred: 64 << 20}, blockSizes{1, 32 << 20, DefaultMaxRequest}},
		{memferry.BlockSizes{Max: 1000}, blockSizes{1, 512, 1000}},
	} {
		x, err := newExport(Export{Backend: sized{newPlain(testSize), c.in}}, DefaultMaxRequest)
		if err != nil {
			t.Fatal(err)
		}
		if x.sizes != c.want || x.sizes.valid() != nil {
			t.Errorf("%+v: %v (valid: %v), want %v", c.in, x.sizes, x.sizes.valid(), c.want)
		}
	}
	for _, min := range []int64{3, 1 << 17, 1 << 16 << 1} {
		if _, err := newExport(Export{Backend: sized{newPlain(testSize), memferry.BlockSizes{Min: min}}}, 1<<20); err == nil {
			t.Errorf("minimum %d is accepted", min)
		}
	}
	if _, err := newExport(Export{Backend: sized{newPlain(1000), memferry.BlockSizes{Min: 512}}}, 1<<20); err == nil {
		t.Error("size 1000 with blocks of 512 is accepted")
	}
}

func TestAdd(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "a", Backend: newPlain(1)})
	if err := s.Add(Export{Name: "a", Backend: newPlain(1)}); !errors.Is(err, memferry.ErrInUse) {
		t.Errorf("same name: %v", err)
	}
	for _, e := range []Export{
		{Name: "a\x00", Backend: newPlain(1)},
		{Name: strings.Repeat("x", maxString+1), Backend: newPlain(1)},
		{Name: "b", Description: "\xff", Backend: newPlain(1)},
		{Name: "c"},
	} {
		if err := s.Add(e); err == nil {
			t.Errorf("%.20q is accepted", e.Name)
		}
	}
}

func TestRemoveDisconnects(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "a", Backend: newPlain(testSize)}, Export{Name: "b", Backend: newPlain(testSize)})
	a, b := connect(t, s), connect(t, s)
	a.enter("a", false)
	b.enter("b", false)
	// Answered once, so the server is past its last look at the exports.
	a.ask(request{typ: cmdRead, length: 1})
	if !s.Remove("a") || s.Remove("a") {
		t.Error("Remove does not tell whether there was an export")
	}
	_ = a.ends()
	if r := b.ask(request{typ: cmdRead, length: 1}); r.errno != 0 {
		t.Errorf("other export: %v", r.errno)
	}
}

// Transmission.

// backends are those that make the server take different ways.
func backends(t *testing.T) map[string]func() (memferry.Backend, *plain) {
	return map[string]func() (memferry.Backend, *plain){
		"plain":  func() (memferry.Backend, *plain) { p := newPattern(testSize); return p, p },
		"able":   func() (memferry.Backend, *plain) { a := newAble(testSize); return a, a.plain },
		"viewed": func() (memferry.Backend, *plain) { v := newViewed(testSize); return v, v.plain },
	}
}

func eachWay(t *testing.T, f func(t *testing.T, w *wire, p *plain, structured bool)) {
	for name, mk := range backends(t) {
		for _, structured := range []bool{false, true} {
			for _, pipe := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s structured=%t pipe=%t", name, structured, pipe), func(t *testing.T) {
					b, p := mk()
					s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
					w := connect(t, s)
					if pipe {
						w = connectPipe(t, s)
					}
					w.enter("x", structured)
					f(t, w, p, structured)
					w.disconnect()
					if v, ok := b.(*viewed); ok && v.views.Load() != 0 {
						t.Errorf("%d views not released", v.views.Load())
					}
					if n := s.memory.inUse(); n != 0 {
						t.Errorf("%d bytes still in use", n)
					}
					if n := len(s.slots); n != 0 {
						t.Errorf("%d requests still in flight", n)
					}
				})
			}
		}
	}
}

func TestReadAndWrite(t *testing.T) {
	eachWay(t, func(t *testing.T, w *wire, p *plain, structured bool) {
		for _, r := range []struct{ off, n int }{{0, 1}, {4095, 2}, {0, testSize}, {testSize - 1, 1}, {100, 65536}, {testSize, 0}, {0, 0}} {
			a := w.ask(request{typ: cmdRead, offset: uint64(r.off), length: uint32(r.n)})
			if a.errno != 0 || a.simple == structured || !bytes.Equal(a.data, p.bytes(r.off, r.n)) {
				t.Errorf("read %+v: error %d, simple %t, %d bytes", r, a.errno, a.simple, len(a.data))
			}
		}
		for _, r := range []struct{ off, n int }{{0, 1}, {4095, 2}, {100, 200_000}, {0, testSize}, {testSize - 1, 1}, {3, 0}} {
			data := bytes.Repeat([]byte{byte(r.n), 0xa5, byte(r.off)}, r.n/3+1)[:r.n]
			a := w.ask(request{typ: cmdWrite, offset: uint64(r.off), length: uint32(r.n)}, data...)
			if a.errno != 0 || !bytes.Equal(data, p.bytes(r.off, r.n)) {
				t.Errorf("write %+v: error %d", r, a.errno)
			}
		}
	})
}

func TestRequestsInOneBurst(t *testing.T) {
	eachWay(t, func(t *testing.T, w *wire, p *plain, _ bool) {
		const n = 700
		var burst []byte
		for i := range uint64(n) {
			if i%3 == 0 {
				burst = appendRequest(burst, request{typ: cmdWrite, cookie: i, offset: i * 1024, length: 512})
				burst = append(burst, bytes.Repeat([]byte{byte(i)}, 512)...)
			} else {
				burst = appendRequest(burst, request{typ: cmdRead, cookie: i, offset: i*1024 + 512, length: 512})
			}
		}
		sent := make(chan error, 1)
		go func() { _, err := w.nc.Write(burst); sent <- err }()
		seen := map[uint64]bool{}
		for range n {
			// A simple reply does not tell whether data follows: peek.
			a := receiveKnown(w, func(cookie uint64) int {
				if cookie%3 == 0 {
					return 0
				}
				return 512
			})
			if a.errno != 0 || seen[a.cookie] {
				t.Fatalf("request %d: error %d, seen %t", a.cookie, a.errno, seen[a.cookie])
			}
			seen[a.cookie] = true
			if i := int(a.cookie); i%3 != 0 && !bytes.Equal(a.data, p.bytes(i*1024+512, 512)) {
				t.Errorf("read %d: wrong data", i)
			}
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		for i := 0; i < n; i += 3 {
			if !bytes.Equal(p.bytes(i*1024, 512), bytes.Repeat([]byte{byte(i)}, 512)) {
				t.Errorf("write %d did not arrive", i)
			}
		}
	})
}

// receiveKnown is receive for replies in any order: length tells how much data
// a successful simple reply has.
func receiveKnown(w *wire, length func(cookie uint64) int) answer {
	w.t.Helper()
	head := w.read(simpleReplyLen)
	if replyMagic(head) != magicSimpleReply {
		h, err := parseChunkHeader(append(head, w.read(chunkHeaderLen-simpleReplyLen)...))
		if err != nil || !h.done() {
			w.t.Fatalf("chunk %+v, error %v", h, err)
		}
		a := answer{cookie: h.cookie}
		w.addChunk(&a, h, w.read(int(h.length)))
		return a
	}
	r, err := parseSimpleReply(head)
	if err != nil {
		w.t.Fatal(err)
	}
	a := answer{cookie: r.cookie, errno: r.err, simple: true}
	if n := length(r.cookie); r.err == 0 && n > 0 {
		a.data = w.read(n)
	}
	return a
}

func TestRefusedRequests(t *testing.T) {
	const longest = 1 << 17
	store := newAble(testSize)
	b := struct {
		*able
		memferry.BlockSizer
	}{store, sized{sizes: memferry.BlockSizes{Min: 512, Max: longest}}}
	readOnly := Export{Name: "ro", Backend: store, ReadOnly: true}
	for _, c := range []struct {
		name       string
		export     string
		structured bool
		rq         request
		want       Errno
	}{
		{"unknown command", "rw", true, request{typ: 4711}, EINVAL},
		{"resize", "rw", true, request{typ: 8}, EINVAL},
		{"unknown flag", "rw", true, request{typ: cmdRead, length: 512, flags: 1 << 9}, EINVAL},
		{"DF without structured replies", "rw", false, request{typ: cmdRead, length: 512, flags: cmdFlagDF}, EINVAL},
		{"DF", "rw", true, request{typ: cmdRead, length: 512, flags: cmdFlagDF}, 0},
		{"FUA on a read", "rw", true, request{typ: cmdRead, length: 512, flags: cmdFlagFUA}, 0},
		{"NO_HOLE on a write", "rw", true, request{typ: cmdWrite, length: 512, flags: cmdFlagNoHole}, EINVAL},
		{"REQ_ONE on a trim", "rw", true, request{typ: cmdTrim, length: 512, flags: cmdFlagReqOne}, EINVAL},
		{"read past the end", "rw", true, request{typ: cmdRead, offset: testSize, length: 512}, EINVAL},
		{"read far past the end", "rw", true, request{typ: cmdRead, offset: 1<<64 - 512, length: 1024}, EINVAL},
		{"read across the end", "rw", false, request{typ: cmdRead, offset: testSize - 512, length: 1024}, EINVAL},
		{"trim past the end", "rw", true, request{typ: cmdTrim, offset: testSize, length: 512}, EINVAL},
		{"write past the end", "rw", true, request{typ: cmdWrite, offset: testSize, length: 512}, ENOSPC},
		{"write past the end, simple", "rw", false, request{typ: cmdWrite, offset: testSize, length: 512}, ENOSPC},
		{"zero past the end", "rw", true, request{typ: cmdWriteZeroes, offset: testSize, length: 512}, ENOSPC},
		{"read too long", "rw", true, request{typ: cmdRead, length: longest + 512}, EOVERFLOW},
		{"read too long, simple", "rw", false, request{typ: cmdRead, length: longest + 512}, EINVAL},
		{"write too long", "rw", true, request{typ: cmdWrite, length: longest + 512}, EINVAL},
		{"unaligned offset", "rw", true, request{typ: cmdRead, offset: 1, length: 512}, EINVAL},
		{"unaligned length", "rw", true, request{typ: cmdWrite, length: 511}, EINVAL},
		{"flush with a length", "rw", true, request{typ: cmdFlush, length: 512}, EINVAL},
		{"flush with an offset", "rw", true, request{typ: cmdFlush, offset: 512}, EINVAL},
		{"block status without a context", "rw", true, request{typ: cmdBlockStatus, length: 512}, EINVAL},
		{"cache, not advertised", "rw", true, request{typ: cmdCache, length: 512}, EINVAL},
		{"read-only: read", "ro", true, request{typ: cmdRead, length: 512}, 0},
		{"read-only: write", "ro", true, request{typ: cmdWrite, length: 512}, EPERM},
		{"read-only: trim", "ro", true, request{typ: cmdTrim, length: 512}, EPERM},
		{"read-only: zero", "ro", true, request{typ: cmdWriteZeroes, length: 512}, EPERM},
		{"plain: trim", "plain", true, request{typ: cmdTrim, length: 512}, EINVAL},
		{"plain: zero", "plain", true, request{typ: cmdWriteZeroes, length: 512}, EINVAL},
		{"fast zero", "rw", true, request{typ: cmdWriteZeroes, length: 512, flags: cmdFlagFastZero | cmdFlagNoHole}, 0},
		{"trim longer than a payload", "rw", true, request{typ: cmdTrim, length: testSize}, 0},
		{"zero-length trim", "rw", true, request{typ: cmdTrim}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startServer(t, ServerOptions{}, Export{Name: "rw", Backend: b}, readOnly, Export{Name: "plain", Backend: newPlain(testSize)})
			w := connect(t, s)
			w.enter(c.export, c.structured)
			var payload []byte
			if c.rq.typ == cmdWrite {
				payload = make([]byte, c.rq.length)
			}
			before := store.writes.Load()
			a := w.ask(c.rq, payload...)
			if a.errno != c.want {
				t.Errorf("error %v, want %v", a.errno, c.want)
			}
			if c.want != 0 && c.structured == (a.message == "") {
				t.Errorf("message %q", a.message)
			}
			if c.want != 0 && len(a.data) != 0 {
				t.Errorf("%d bytes of data with an error", len(a.data))
			}
			if store.writes.Load() != before {
				t.Error("a refused write was written")
			}
			// Still in step.
			if a := w.ask(request{typ: cmdRead, length: 512}); a.errno != 0 {
				t.Errorf("next read: %v", a.errno)
			}
			w.disconnect()
		})
	}
}

func TestOversizeWriteIsAnsweredThenDisconnected(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: newPlain(testSize)})
	w := connect(t, s)
	w.enter("x", true)
	w.send(request{typ: cmdWrite, cookie: 5, length: 1<<32 - 1})
	if a := w.receive(0); a.errno != ENOSPC || a.cookie != 5 {
		t.Errorf("answer %+v", a)
	}
	if err := w.ends(); !errors.Is(err, errAnswered) {
		t.Errorf("error %v", err)
	}
}

func TestBadMagicEndsTheConnection(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: newPlain(testSize)})
	w := connect(t, s)
	w.enter("x", true)
	w.write(make([]byte, requestLen))
	if err := w.ends(); !errors.Is(err, errProtocol) {
		t.Errorf("error %v", err)
	}
}

func TestBackendErrors(t *testing.T) {
	for err, want := range map[error]Errno{
		errors.New("unknown"):    EIO,
		memferry.ErrReadOnly:     EPERM,
		memferry.ErrNoSpace:      ENOSPC,
		syscall.ENOSPC:           ENOSPC,
		syscall.EDQUOT:           ENOSPC,
		syscall.EFBIG:            ENOSPC,
		syscall.EACCES:           EPERM,
		syscall.ENOMEM:           ENOMEM,
		memferry.ErrTimeout:      EIO,
		memferry.ErrChanged:      EIO,
		memferry.ErrClosed:       EIO,
		io.EOF:                   EIO,
		ENOSPC:                   ENOSPC,
		ENOTSUP:                  EINVAL,
		fmt.Errorf("x: %w", EIO): EIO,
	} {
		s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: &broken{newPlain(testSize), err}})
		w := connect(t, s)
		w.enter("x", true)
		for _, rq := range []request{{typ: cmdRead, length: 100}, {typ: cmdFlush}, {typ: cmdWrite, length: 3}} {
			var payload []byte
			if rq.typ == cmdWrite {
				payload = []byte("abc")
			}
			a := w.ask(rq, payload...)
			if a.errno != want || len(a.data) != 0 {
				t.Errorf("%v on %s: error %v with %d bytes, want %v", err, commandName(rq.typ), a.errno, len(a.data), want)
			}
		}
		w.disconnect()
	}
}

func TestFlushAndFUA(t *testing.T) {
	eachWay(t, func(t *testing.T, w *wire, p *plain, _ bool) {
		if a := w.ask(request{typ: cmdFlush}); a.errno != 0 || p.syncs.Load() != 1 {
			t.Errorf("FLUSH: error %d, %d syncs", a.errno, p.syncs.Load())
		}
		if a := w.ask(request{typ: cmdWrite, length: 2, flags: cmdFlagFUA}, 1, 2); a.errno != 0 || p.syncs.Load() != 2 {
			t.Errorf("WRITE with FUA: error %d, %d syncs", a.errno, p.syncs.Load())
		}
		if a := w.ask(request{typ: cmdWrite, length: 2}, 1, 2); a.errno != 0 || p.syncs.Load() != 2 {
			t.Errorf("WRITE: error %d, %d syncs", a.errno, p.syncs.Load())
		}
	})
}

func TestTrimAndZeroes(t *testing.T) {
	for _, b := range []memferry.Backend{newAble(testSize), newViewed(testSize)} {
		a, ok := b.(*able)
		if !ok {
			a = b.(*viewed).able
		}
		s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
		w := connect(t, s)
		w.enter("x", true)
		if r := w.ask(request{typ: cmdTrim, offset: 4096, length: 8192, flags: cmdFlagFUA}); r.errno != 0 || a.trimmed.Load() != 8192 || a.syncs.Load() != 1 {
			t.Errorf("TRIM: error %d, %d bytes, %d syncs", r.errno, a.trimmed.Load(), a.syncs.Load())
		}
		if r := w.ask(request{typ: cmdWriteZeroes, offset: 100, length: 1000, flags: cmdFlagNoHole}); r.errno != 0 || !bytes.Equal(a.bytes(100, 1000), make([]byte, 1000)) {
			t.Errorf("WRITE_ZEROES: error %d", r.errno)
		}
		if f := memferry.ZeroFlags(a.lastZ.Load()); f != memferry.ZeroNoHole {
			t.Errorf("flags %d", f)
		}
		a.mu.Lock()
		a.zeroErr = memferry.ErrNotSupported
		a.mu.Unlock()
		if r := w.ask(request{typ: cmdWriteZeroes, offset: 8192, length: 4096, flags: cmdFlagFastZero}); r.errno != ENOTSUP || bytes.Equal(a.bytes(8192, 4096), make([]byte, 4096)) {
			t.Errorf("FAST_ZERO that is not: error %v", r.errno)
		}
		// Without the flag it must not fail for being slow.
		if r := w.ask(request{typ: cmdWriteZeroes, offset: 1000, length: 600_000}); r.errno != 0 || !bytes.Equal(a.bytes(1000, 600_000), make([]byte, 600_000)) {
			t.Errorf("slow WRITE_ZEROES: error %v", r.errno)
		}
		w.disconnect()
	}
}

func TestBlockStatus(t *testing.T) {
	a := newAble(testSize)
	clear(a.data[8192 : 8192+40960])
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: a})
	w := connect(t, s)
	w.enter("x", true, contextGeneration, contextBase)
	const zero = stateHole | stateZero
	for _, c := range []struct {
		rq   request
		want []statusExtent
	}{
		{request{length: testSize}, []statusExtent{{8192, 0}, {40960, zero}, {testSize - 49152, 0}}},
		{request{length: testSize, flags: cmdFlagReqOne}, []statusExtent{{8192, 0}}},
		{request{offset: 10000, length: 4096}, []statusExtent{{4096, zero}}},
		{request{offset: 10000, length: 40960, flags: cmdFlagReqOne}, []statusExtent{{49152 - 10000, zero}}},
	} {
		c.rq.typ = cmdBlockStatus
		r := w.ask(c.rq)
		if d := cmp.Diff(c.want, r.status[1], cmpAll); r.errno != 0 || d != "" {
			t.Errorf("%+v: error %d (-want +got)\n%s", c.rq, r.errno, d)
		}
		if d := cmp.Diff([]statusExtent{{c.rq.length, 0}}, r.status[2], cmpAll); d != "" {
			t.Errorf("generation (-want +got)\n%s", d)
		}
	}
	w.disconnect()
}

func TestHolesAreSentAsHoles(t *testing.T) {
	v := newViewed(testSize)
	clear(v.data[:512<<10])
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: v})
	w := connect(t, s)
	w.enter("x", true)
	read := func(off, n int, flags uint16) answer {
		r := w.ask(request{typ: cmdRead, flags: flags, offset: uint64(off), length: uint32(n)})
		if r.errno != 0 || !bytes.Equal(r.data, v.bytes(off, n)) {
			t.Errorf("read %d at %d: error %d or wrong data", n, off, r.errno)
		}
		return r
	}
	// One page of seven extents at a time is what the backend tells, so ask for
	// no more.
	if r := read(0, 28<<10, 0); r.holes != 0 {
		t.Error("a short read looked for holes")
	}
	if r := read(512<<10, 64<<10, 0); r.holes != 0 {
		t.Error("data sent as a hole")
	}
	w.disconnect()

	big := &hollow{newViewed(testSize)}
	s = startServer(t, ServerOptions{}, Export{Name: "x", Backend: big})
	w = connect(t, s)
	w.enter("x", true)
	for i := range 3 {
		if r := w.ask(request{typ: cmdRead, length: 256 << 10}); r.holes != 1 || len(r.data) != 256<<10 {
			t.Errorf("read %d: %d holes, %d bytes", i, r.holes, len(r.data))
		}
	}
	if r := w.ask(request{typ: cmdRead, length: 256 << 10, flags: cmdFlagDF}); r.holes != 0 {
		t.Error("a hole although DF was set")
	}
	w.disconnect()
}

// hollow calls everything a hole.
type hollow struct{ *viewed }

func (hollow) Extents(_ context.Context, off, n int64) ([]memferry.Extent, error) {
	return []memferry.Extent{{Off: off, Len: n, Flags: memferry.ExtentHole | memferry.ExtentZero}}, nil
}

func TestLargeWritesGoInPieces(t *testing.T) {
	const size = 8 << 20
	p := newPlain(size)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: p})
	w := connect(t, s)
	w.enter("x", true)
	data := make([]byte, 5<<20)
	for i := range data {
		data[i] = byte(i * 7 >> 3)
	}
	a := w.ask(request{typ: cmdWrite, offset: 12345, length: uint32(len(data)), flags: cmdFlagFUA}, data...)
	if a.errno != 0 || !bytes.Equal(p.bytes(12345, len(data)), data) {
		t.Errorf("error %d, or wrong data", a.errno)
	}
	if n := p.writes.Load(); n != 6 {
		t.Errorf("%d writes, want 6", n)
	}
	if n := p.syncs.Load(); n != 1 {
		t.Errorf("%d syncs, want 1", n)
	}
	w.disconnect()
}

func TestSlowRequestHoldsUpNoOther(t *testing.T) {
	b := newStuck(testSize, 8192)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
	w := connect(t, s)
	w.enter("x", true)
	w.send(request{typ: cmdRead, cookie: 1, offset: 8192, length: 4096})
	w.send(request{typ: cmdWrite, cookie: 2, offset: 8192, length: 1}, 9)
	<-b.entered
	<-b.entered
	for i := range 10 {
		if a := w.ask(request{typ: cmdRead, offset: uint64(i), length: 100}); a.errno != 0 {
			t.Errorf("read %d: %v", i, a.errno)
		}
	}
	if a := w.ask(request{typ: cmdFlush}); a.errno != 0 {
		t.Errorf("flush: %v", a.errno)
	}
	close(b.release)
	got := map[uint64]bool{}
	for range 2 {
		got[w.receive(0).cookie] = true
	}
	if !got[1] || !got[2] {
		t.Errorf("answers %v", got)
	}
	w.disconnect()
}

func TestDisconnectWaitsForRequestsInFlight(t *testing.T) {
	b := newStuck(testSize, 0)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
	w := connect(t, s)
	w.enter("x", true)
	w.send(request{typ: cmdRead, cookie: 1, length: 4096})
	<-b.entered
	w.send(request{typ: cmdDisc})
	close(b.release)
	if a := w.receive(0); a.cookie != 1 || len(a.data) != 4096 {
		t.Errorf("answer %+v", a)
	}
	if err := w.ends(); err != nil {
		t.Error(err)
	}
}

func TestRequestsInFlightAreBounded(t *testing.T) {
	b := newStuck(testSize, 0)
	s := startServer(t, ServerOptions{MaxInFlight: 4}, Export{Name: "x", Backend: b})
	w := connect(t, s)
	w.enter("x", true)
	for i := range uint64(20) {
		w.send(request{typ: cmdRead, cookie: i, length: 512})
	}
	for range 4 {
		<-b.entered
	}
	if n := s.Stats().InFlight; n != 4 {
		t.Errorf("%d requests in flight, limit 4", n)
	}
	close(b.release)
	for range 20 {
		if a := w.receive(0); a.errno != 0 {
			t.Error(a.errno)
		}
	}
	w.disconnect()
}

func TestMemoryIsBounded(t *testing.T) {
	const limit = 1 << 20
	b := newStuck(4*limit, 0)
	s := startServer(t, ServerOptions{MaxRequest: limit, MaxMemory: limit}, Export{Name: "x", Backend: b})
	var all []*wire
	for range 8 {
		w := connect(t, s)
		w.enter("x", true)
		w.send(request{typ: cmdRead, length: limit / 2})
		all = append(all, w)
	}
	<-b.entered
	<-b.entered
	if n := s.Stats().Memory; n > limit {
		t.Errorf("%d bytes in use, limit %d", n, limit)
	}
	close(b.release)
	for _, w := range all {
		if a := w.receive(0); a.errno != 0 || len(a.data) != limit/2 {
			t.Errorf("error %v, %d bytes", a.errno, len(a.data))
		}
		w.disconnect()
	}
	if n := s.Stats().Memory; n != 0 {
		t.Errorf("%d bytes in use at the end", n)
	}
}

// Hostile and slow clients.

func TestSlowHandshakeIsCut(t *testing.T) {
	s := startServer(t, ServerOptions{HandshakeTimeout: 50 * time.Millisecond}, Export{Name: "x", Backend: newPlain(testSize)})
	for name, bytes := range map[string][]byte{
		"nothing":       nil,
		"half flags":    {0, 0},
		"half a header": append(appendClientFlags(nil, 3), 'I', 'H'),
		"half an option": append(appendClientFlags(nil, 3),
			appendOptionHeader(nil, optionHeader{optGo, 100})...),
	} {
		w := connect(t, s)
		w.read(greetingLen)
		w.write(bytes)
		if err := w.ends(); !isTimeout(err) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestEndlessOptionsAreCut(t *testing.T) {
	s := startServer(t, ServerOptions{MaxOptions: 10}, Export{Name: "x", Backend: newPlain(testSize)})
	w := connect(t, s).hello()
	for range 10 {
		w.final(optList, nil)
	}
	if err := w.ends(); !errors.Is(err, errProtocol) {
		t.Errorf("error %v", err)
	}
}

func TestHugeOptionIsCut(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: newPlain(testSize)})
	w := connect(t, s).hello()
	w.write(appendOptionHeader(nil, optionHeader{optGo, 1<<32 - 1}))
	if err := w.ends(); !errors.Is(err, errProtocol) {
		t.Errorf("error %v", err)
	}
}

func TestHalfSentRequestIsCut(t *testing.T) {
	header := appendRequest(nil, request{typ: cmdWrite, length: 100_000})
	for name, b := range map[string]memferry.Backend{"plain": newPlain(testSize), "viewed": newViewed(testSize)} {
		for _, send := range [][]byte{header[:10], header, append(bytes.Clone(header), make([]byte, 50_000)...)} {
			s := startServer(t, ServerOptions{RequestTimeout: 50 * time.Millisecond}, Export{Name: "x", Backend: b})
			w := connect(t, s)
			w.enter("x", false)
			w.write(send)
			if err := w.ends(); !isTimeout(err) {
				t.Errorf("%s, %d bytes: error %v", name, len(send), err)
			}
			if n := s.Stats().Memory; n != 0 {
				t.Errorf("%d bytes in use", n)
			}
		}
	}
}

func TestIdleConnectionIsKept(t *testing.T) {
	s := startServer(t, ServerOptions{RequestTimeout: 20 * time.Millisecond, HandshakeTimeout: 5 * time.Second}, Export{Name: "x", Backend: newPlain(testSize)})
	w := connect(t, s)
	w.enter("x", false)
	for range 3 {
		// In two parts, so that the deadline is set.
		rq := appendRequest(nil, request{typ: cmdRead, length: 10})
		w.write(rq[:5])
		w.write(rq[5:])
		if a := w.receive(10); a.errno != 0 {
			t.Fatal(a.errno)
		}
		time.Sleep(60 * time.Millisecond)
	}
	w.disconnect()
}

func TestClientThatNeverReadsIsCut(t *testing.T) {
	for name, b := range map[string]memferry.Backend{"plain": newPattern(testSize), "viewed": newViewed(testSize)} {
		s := startServer(t, ServerOptions{WriteTimeout: 100 * time.Millisecond}, Export{Name: "x", Backend: b})
		w := connect(t, s)
		w.enter("x", false)
		go func() {
			for range 100 {
				if _, err := w.nc.Write(appendRequest(nil, request{typ: cmdRead, length: testSize})); err != nil {
					return
				}
			}
		}()
		select {
		case err := <-w.done:
			if err == nil {
				t.Errorf("%s: no error", name)
			}
		case <-time.After(hang):
			t.Fatalf("%s: the server waits", name)
		}
		if n := s.Stats().Memory; n != 0 {
			t.Errorf("%s: %d bytes in use", name, n)
		}
		if v, ok := b.(*viewed); ok && v.views.Load() != 0 {
			t.Errorf("%d views not released", v.views.Load())
		}
	}
}

func TestTooManyConnections(t *testing.T) {
	s := startServer(t, ServerOptions{MaxConnections: 2}, Export{Name: "x", Backend: newPlain(testSize)})
	a, b := connect(t, s), connect(t, s)
	a.enter("x", false)
	b.enter("x", false)
	c := connect(t, s)
	if err := c.ends(); !errors.Is(err, errTooManyConnections) {
		t.Errorf("third client: %v", err)
	}
	a.disconnect()
	d := connect(t, s)
	d.enter("x", false)
	if st := s.Stats(); st.Connections != 2 || st.Refused != 1 || st.Accepted != 3 {
		t.Errorf("stats %+v", st)
	}
	b.disconnect()
	d.disconnect()
}

// Life.

func serve(t *testing.T, s *Server) (addr string, done chan error) {
	t.Helper()
	l, err := net.Listen("unix", testenv.TempSocket(t))
	if err != nil {
		t.Fatal(err)
	}
	verdict := make(chan error, 1)
	go func() { verdict <- s.Serve(context.Background(), l) }()
	return l.Addr().String(), verdict
}

func dial(t *testing.T, addr string) *wire {
	t.Helper()
	nc, err := net.Dial("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	if err := nc.SetDeadline(time.Now().Add(hang)); err != nil {
		t.Fatal(err)
	}
	return &wire{t: t, nc: nc}
}

func TestShutdownDrains(t *testing.T) {
	b := newStuck(testSize, 0)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
	addr, done := serve(t, s)
	w, idle, early := dial(t, addr), dial(t, addr), dial(t, addr)
	w.enter("x", true)
	idle.enter("x", true)
	early.hello()
	w.send(request{typ: cmdRead, cookie: 3, length: 100})
	<-b.entered
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(testenv.Deadline(t, hang)) }()
	for _, other := range []*wire{idle, early} {
		if n, err := io.Copy(io.Discard, other.nc); n != 0 || err != nil {
			t.Errorf("idle client: %d bytes, error %v", n, err)
		}
	}
	select {
	case err := <-down:
		t.Fatalf("Shutdown did not wait: %v", err)
	default:
	}
	close(b.release)
	if a := w.receive(0); a.errno != 0 || len(a.data) != 100 {
		t.Errorf("request in flight: %+v", a)
	}
	if err := <-down; err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := s.Serve(context.Background(), mustListen(t)); !errors.Is(err, memferry.ErrClosed) {
		t.Errorf("Serve after Shutdown: %v", err)
	}
}

func mustListen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", testenv.TempSocket(t))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestShutdownGivesUp(t *testing.T) {
	b := newStuck(testSize, 0)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
	addr, done := serve(t, s)
	w := dial(t, addr)
	w.enter("x", true)
	w.send(request{typ: cmdRead, length: 100})
	<-b.entered
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	close(b.release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestCloseIsPrompt(t *testing.T) {
	b := newViewed(testSize)
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: b})
	addr, done := serve(t, s)
	w := dial(t, addr)
	w.enter("x", false)
	// The client does not read, so the server waits in a write.
	for range 100 {
		w.send(request{typ: cmdRead, length: testSize})
	}
	for b.views.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(hang):
		t.Fatal("Serve does not return")
	}
	if n := b.views.Load(); n != 0 {
		t.Errorf("%d views not released", n)
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: newPlain(testSize)})
	l := mustListen(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	w := dial(t, l.Addr().String())
	w.enter("x", false)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// The server goes on with other listeners.
	v := connect(t, s)
	v.enter("x", false)
	v.disconnect()
}

func TestStats(t *testing.T) {
	s := startServer(t, ServerOptions{}, Export{Name: "x", Backend: newAble(testSize)})
	w := connect(t, s)
	w.enter("x", true)
	w.ask(request{typ: cmdRead, length: 100})
	w.ask(request{typ: cmdWrite, length: 3}, 1, 2, 3)
	w.ask(request{typ: cmdFlush})
	w.ask(request{typ: cmdTrim, length: 1})
	w.ask(request{typ: cmdRead, offset: testSize, length: 1})
	want := ServerStats{Connections: 1, Accepted: 1, Reads: 2, Writes: 1, Flushes: 1, Trims: 1, ReadBytes: 100, WriteBytes: 3, Errors: 1}
	got := s.Stats()
	got.InFlight, got.Memory = 0, 0 // given back after the answer is sent
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	w.disconnect()
	want.Connections, want.Others = 0, 1
	if d := cmp.Diff(want, s.Stats()); d != "" {
		t.Errorf("after the client left (-want +got)\n%s", d)
	}
}

func TestSyncsAreShared(t *testing.T) {
	var g syncGroup
	running, release := make(chan struct{}, 10), make(chan struct{})
	g.sync = func() error { running <- struct{}{}; <-release; return EIO }
	results := make(chan error, 10)
	go func() { results <- g.do() }()
	<-running
	// These began while one was running, so they need another, and share it.
	for range 5 {
		go func() { results <- g.do() }()
	}
	for g.waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
	close(release)
	for range 6 {
		if err := <-results; !errors.Is(err, EIO) {
			t.Errorf("error %v", err)
		}
	}
	if n := len(running) + 1; n > 6 || n < 2 {
		t.Errorf("%d syncs", n)
	}
}

func (g *syncGroup) waiting() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.next == nil {
		return 0
	}
	return 1
}
