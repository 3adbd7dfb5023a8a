package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// fuzzSize is that of the exports that fuzzed clients get.
const fuzzSize = 64 << 10

func fuzzServer(t testing.TB) *Server {
	o := ServerOptions{
		MaxRequest: 64 << 10, MaxMemory: 256 << 10, MaxInFlight: 4, MaxOptions: 50,
		HandshakeTimeout: hang, RequestTimeout: hang, WriteTimeout: hang,
	}
	return startServer(t, o,
		Export{Name: "", Backend: newViewed(fuzzSize)},
		Export{Name: "able", Description: "an export", Backend: newAble(fuzzSize)},
		Export{Name: "ro", Backend: newPlain(fuzzSize), ReadOnly: true})
}

// converse sends everything at once and returns what the server says until it
// ends the connection, which it must, since the client sends no more.
func converse(t testing.TB, s *Server, sent []byte) []byte {
	t.Helper()
	client, server := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- s.ServeConn(context.Background(), halfClosed{server, bytes.NewReader(sent)}) }()
	if err := client.SetDeadline(time.Now().Add(hang)); err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(client)
	if err != nil {
		t.Fatalf("the server does not end: %v", err)
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	<-done
	if n := s.memory.inUse(); n != 0 {
		t.Errorf("%d bytes still in use", n)
	}
	if n := len(s.slots); n != 0 {
		t.Errorf("%d requests still in flight", n)
	}
	return said
}

// halfClosed is a connection whose other side has sent all it will.
type halfClosed struct {
	net.Conn
	from io.Reader
}

func (h halfClosed) Read(p []byte) (int, error) { return h.from.Read(p) }

// transcripts returns what real clients sent, by program, and what follows
// their handshake.
func transcripts(t testing.TB) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob("testdata/client-*.bin")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no transcripts (%v): run go test -run TestRecordTranscripts with MEMFERRY_RECORD=1", err)
	}
	all := map[string][]byte{}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(p)] = b
	}
	return all
}

// afterHandshake cuts off what precedes transmission: the options up to GO.
func afterHandshake(b []byte) ([]byte, error) {
	if len(b) < clientFlagsLen {
		return nil, io.ErrUnexpectedEOF
	}
	b = b[clientFlagsLen:]
	for len(b) >= optionHeaderLen {
		h, err := parseOptionHeader(b)
		if err != nil {
			return nil, err
		}
		b = b[optionHeaderLen:]
		if uint64(h.length) > uint64(len(b)) {
			return nil, io.ErrUnexpectedEOF
		}
		b = b[h.length:]
		if h.option == optGo || h.option == optExportName {
			return b, nil
		}
	}
	return nil, errors.New("no transmission")
}

func FuzzServerHandshake(f *testing.F) {
	for _, b := range transcripts(f) {
		f.Add(b)
	}
	flags := appendClientFlags(nil, flagClientFixedNewstyle|flagClientNoZeroes)
	meta := appendMetaRequest(nil, metaRequest{"able", []string{contextBase, contextGeneration}})
	f.Add(appendOption(flags, optListMetaContext, meta))
	f.Add(appendOptionHeader(flags, optionHeader{optGo, 1<<32 - 1}))
	f.Add(appendOption(flags, optExportName, []byte("ro")))
	f.Fuzz(func(t *testing.T, sent []byte) {
		converse(t, fuzzServer(t), sent)
	})
}

func FuzzServerTransmission(f *testing.F) {
	for name, b := range transcripts(f) {
		if rest, err := afterHandshake(b); err == nil {
			f.Add(uint8(0), true, rest)
			f.Add(uint8(1), false, rest)
		} else {
			f.Logf("%s: %v", name, err)
		}
	}
	for typ := range cmdBlockStatus + 2 {
		rq := request{typ: typ, cookie: 7, offset: 512, length: 4096}
		f.Add(uint8(typ), true, append(appendRequest(nil, rq), make([]byte, 4096)...))
		rq.flags, rq.length = cmdFlagFUA, 1<<32-1
		f.Add(uint8(typ), false, appendRequest(nil, rq))
	}
	f.Fuzz(func(t *testing.T, export uint8, structured bool, sent []byte) {
		name := []string{"", "able", "ro"}[export%3]
		hello := appendClientFlags(nil, flagClientFixedNewstyle|flagClientNoZeroes)
		if structured {
			hello = appendOption(hello, optStructuredReply, nil)
			hello = appendOption(hello, optSetMetaContext, appendMetaRequest(nil, metaRequest{name, []string{contextBase, contextGeneration}}))
		}
		hello = appendOption(hello, optGo, appendInfoRequest(nil, infoRequest{name: name}))
		converse(t, fuzzServer(t), append(hello, sent...))
	})
}
