package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/memferry/memferry"
)

const testSize = 1 << 20

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
