package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/memferry/memferry"
)

// peer is a server that does as it is told: enough of the protocol for a
// client, and what no server of ours would do.
type peer struct {
	flags      uint16 // of the greeting
	greeting   []byte // instead of it
	structured bool
	noGo       bool
	size       uint64
	export     TransmissionFlags
	blocks     *blockSizes

	// answer returns the bytes that answer a request, and whether the
	// connection ends with them. nil serves reads of pattern.
	answer func(rq request, payload []byte) (reply []byte, end bool)

	content []byte
	early   chan string // options that were sent too early

	hand  chan net.Conn                 // gets what is in transmission, instead of answer
	pair  func() (client, srv net.Conn) // net.Pipe if nil
	dials atomic.Int64
}

const peerSize = 1 << 20

func newPeer() *peer {
	p := &peer{flags: flagFixedNewstyle | flagNoZeroes, size: peerSize, early: make(chan string, 16)}
	p.export = FlagHasFlags | FlagSendFlush | FlagSendFUA
	p.content = newPattern(peerSize).data
	return p
}

// dial is the Dialer of a client of the peer.
func (p *peer) dial(context.Context, string, string) (net.Conn, error) {
	p.dials.Add(1)
	pair := p.pair
	if pair == nil {
		pair = net.Pipe
	}
	client, server := pair()
	go func() {
		_ = server.SetDeadline(time.Now().Add(hang)) // an error shows in what the client says
		up := p.handshake(server)
		if up && p.hand != nil {
			p.hand <- server
			return
		}
		defer server.Close()
		if up {
			p.transmit(server)
		}
	}()
	return client, nil
}

func (p *peer) client(o ClientOptions) (*Client, error) {
	o.Dialer = p.dial
	if o.IOTimeout == 0 {
		o.IOTimeout = 300 * time.Millisecond
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 2 * time.Second
	}
	return Dial(context.Background(), URI{Host: "peer", Export: "x"}, o)
}

// handshake reports whether transmission begins.
func (p *peer) handshake(nc net.Conn) bool {
	hello := p.greeting
	if hello == nil {
		hello = appendGreeting(nil, p.flags)
	}
	if _, err := nc.Write(hello); err != nil || p.greeting != nil {
		return false
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(nc, b); err != nil {
		return false
	}
	zeroes := parseClientFlags(b)&flagClientNoZeroes == 0
	for {
		b := make([]byte, optionHeaderLen)
		if _, err := io.ReadFull(nc, b); err != nil {
			return false
		}
		h, err := parseOptionHeader(b)
		if err != nil {
			return false
		}
		data := make([]byte, h.length)
		if _, err := io.ReadFull(nc, data); err != nil {
			return false
		}
		p.checkNothingSent(nc, h.option)
		if h.option == optExportName {
			_, err := nc.Write(appendExportNameReply(nil, exportNameReply{p.size, p.export}, !zeroes))
			return err == nil
		}
		reply, on := p.option(h.option)
		if _, err := nc.Write(reply); err != nil {
			return false
		}
		if on {
			return true
		}
	}
}

// checkNothingSent notes a client that does not wait for the final reply. Over
// a net.Pipe a byte too early is a write that is waiting now.
func (p *peer) checkNothingSent(nc net.Conn, option uint32) {
	_ = nc.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, _ := nc.Read(make([]byte, 1)); n > 0 {
		p.early <- optionName(option)
	}
	_ = nc.SetReadDeadline(time.Now().Add(hang))
}

func (p *peer) option(option uint32) (reply []byte, transmission bool) {
	switch option {
	case optStructuredReply:
		if p.structured {
			return appendOptionReply(nil, option, repAck, nil), false
		}
	case optSetMetaContext:
		b := appendOptionReply(nil, option, repMetaContext, appendMetaReply(nil, metaReply{7, contextBase}))
		return appendOptionReply(b, option, repAck, nil), false
	case optGo:
		if p.noGo {
			break
		}
		var b []byte
		if p.blocks != nil {
			b = appendOptionReply(b, option, repInfo, appendInfoBlockSize(nil, *p.blocks))
		}
		b = appendOptionReply(b, option, repInfo, appendInfoExport(nil, exportNameReply{p.size, p.export}))
		return appendOptionReply(b, option, repAck, nil), true
	}
	return appendOptionReply(nil, option, repErrUnsup, nil), false
}

func (p *peer) transmit(nc net.Conn) {
	b := make([]byte, requestLen)
	for {
		if _, err := io.ReadFull(nc, b); err != nil {
			return
		}
		rq, err := parseRequest(b)
		if err != nil || rq.typ == cmdDisc {
			return
		}
		var payload []byte
		if rq.typ == cmdWrite {
			payload = make([]byte, rq.length)
			if _, err := io.ReadFull(nc, payload); err != nil {
				return
			}
		}
		answer := p.answer
		if answer == nil {
			answer = p.serve
		}
		reply, end := answer(rq, payload)
		if _, err := nc.Write(reply); err != nil || end {
			return
		}
	}
}

// serve answers as a simple server would.
func (p *peer) serve(rq request, payload []byte) ([]byte, bool) {
	off, n := rq.offset, uint64(rq.length)
	if p.blocks != nil && (off%uint64(p.blocks.minimum) != 0 || n%uint64(p.blocks.minimum) != 0 || rq.typ <= cmdWrite && n > uint64(p.blocks.maximum)) {
		return appendSimpleReply(nil, simpleReply{EINVAL, rq.cookie}), false
	}
	switch rq.typ {
	case cmdRead:
		if p.structured {
			b := appendOffsetData(nil, replyFlagDone, rq.cookie, off, rq.length)
			return append(b, p.content[off:off+n]...), false
		}
		return append(appendSimpleReply(nil, simpleReply{0, rq.cookie}), p.content[off:off+n]...), false
	case cmdWrite:
		copy(p.content[off:], payload)
	}
	return appendSimpleReply(nil, simpleReply{0, rq.cookie}), false
}

// TestPeers talks to servers of all ages and tastes.
func TestPeers(t *testing.T) {
	for name, tune := range map[string]func(*peer){
		"simple replies":              func(*peer) {},
		"structured replies":          func(p *peer) { p.structured = true },
		"no GO":                       func(p *peer) { p.noGo = true },
		"no GO, zeroes":               func(p *peer) { p.noGo = true; p.flags = flagFixedNewstyle },
		"newstyle that is not fixed":  func(p *peer) { p.flags = 0 },
		"blocks of 512":               func(p *peer) { p.blocks = &blockSizes{512, 4096, 1 << 16} },
		"blocks of 4096":              func(p *peer) { p.blocks = &blockSizes{4096, 4096, 4096} },
		"blocks of 64K":               func(p *peer) { p.blocks = &blockSizes{1 << 16, 1 << 16, 1 << 17}; p.structured = true },
		"a maximum that is not round": func(p *peer) { p.blocks = &blockSizes{512, 512, 1<<15 + 512} },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPeer()
			tune(p)
			c, err := p.client(ClientOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			exercise(t, c)
			if len(p.early) > 0 {
				t.Errorf("the client sent more before the final reply to %s", <-p.early)
			}
		})
	}
}

// exercise reads and writes ranges that fit no block.
func exercise(t *testing.T, c *Client) {
	t.Helper()
	want := bytes.Clone(newPattern(peerSize).data)
	check := func(off, n int) {
		t.Helper()
		got := make([]byte, n)
		if _, err := c.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, want[off:off+n]) {
			t.Fatalf("read of %d at %d: error %v, first difference at %d", n, off, err, firstDifference(got, want[off:off+n]))
		}
		streamed := make([]byte, n)
		err := c.ReadStream(context.Background(), int64(off), int64(n), func(at, k int64, p []byte) error {
			copy(streamed[at-int64(off):][:k], p)
			return nil
		})
		if err != nil || !bytes.Equal(streamed, want[off:off+n]) {
			t.Fatalf("stream of %d at %d: error %v", n, off, err)
		}
	}
	check(0, 4096)
	check(1, 3)
	check(4095, 70_000)
	check(peerSize-5, 5)
	check(0, peerSize)
	for _, r := range [][2]int{{0, 4096}, {7, 9}, {65_000, 140_000}, {peerSize - 3, 3}} {
		p := bytes.Repeat([]byte{byte(r[0] + 1)}, r[1])
		if _, err := c.WriteAt(p, int64(r[0])); err != nil {
			t.Fatalf("write of %d at %d: %v", r[1], r[0], err)
		}
		copy(want[r[0]:], p)
	}
	check(0, peerSize)
	if err := c.Sync(); err != nil {
		t.Errorf("sync: %v", err)
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// TestPeerReadOnly must not send a write at all.
func TestPeerReadOnly(t *testing.T) {
	p := newPeer()
	p.export |= FlagReadOnly
	p.answer = func(rq request, payload []byte) ([]byte, bool) {
		if rq.typ == cmdWrite {
			t.Error("a write was sent to a read-only export")
		}
		return p.serve(rq, payload)
	}
	c, err := p.client(ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.WriteAt(make([]byte, 512), 0); !errors.Is(err, memferry.ErrReadOnly) {
		t.Errorf("write: %v, want ErrReadOnly", err)
	}
	if !c.Capabilities().ReadOnly {
		t.Error("not read-only")
	}
}

// TestPeerGreetings are no NBD servers, or too old.
func TestPeerGreetings(t *testing.T) {
	oldstyle := append([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"), make([]byte, 8+4+124)...)
	for name, hello := range map[string][]byte{
		"oldstyle": oldstyle,
		"SSH":      []byte("SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"),
		"nothing":  {},
		"half":     []byte("NBDMAGICIHAVEO"),
		"HTTP":     []byte("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			p := newPeer()
			p.greeting = hello
			c, err := p.client(ClientOptions{})
			if err == nil {
				c.Close()
				t.Fatal("connected")
			}
			if !strings.Contains(err.Error(), "nbd:") || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q", err)
			}
		})
	}
}

// TestPeerReplies are answers to a read of 4096 bytes at 8192. Those that are
// right deliver the data; those that break the protocol end the connection, and
// the read fails once its time is over; an error is the server's own.
func TestPeerReplies(t *testing.T) {
	const off, n = 8192, 4096
	data := func(flags uint16, rq request, from, to uint64) []byte {
		b := appendOffsetData(nil, flags, rq.cookie, from, uint32(to-from))
		return append(b, newPattern(peerSize).data[from:to]...)
	}
	raw := func(rq request, flags, typ uint16, length uint32, b []byte) []byte {
		return append(appendChunkHeader(nil, chunkHeader{flags, typ, rq.cookie, length}), b...)
	}
	join := func(bs ...[]byte) []byte { return bytes.Join(bs, nil) }
	none := func(rq request) []byte { return raw(rq, replyFlagDone, chunkNone, 0, nil) }
	for name, x := range map[string]struct {
		reply func(rq request) []byte
		want  error // nil: the data
	}{
		"chunks out of order": {func(rq request) []byte {
			return join(data(0, rq, off+1024, off+n), data(0, rq, off, off+1024), none(rq))
		}, nil},
		"an error chunk in the middle": {func(rq request) []byte {
			return join(data(0, rq, off, off+512), appendErrorChunk(nil, rq.cookie, EIO, "disk on fire"))
		}, EIO},
		"an error at an offset": {func(rq request) []byte {
			b := be.AppendUint32(nil, uint32(EIO))
			b = be.AppendUint16(b, 0)
			b = be.AppendUint64(b, off+512)
			return raw(rq, replyFlagDone, chunkErrorOffset, uint32(len(b)), b)
		}, EIO},
		"data before the request": {func(rq request) []byte { return data(replyFlagDone, rq, off-512, off+512) }, memferry.ErrTimeout},
		"data behind the request": {func(rq request) []byte { return data(replyFlagDone, rq, off+512, off+n+512) }, memferry.ErrTimeout},
		"the same data twice":     {func(rq request) []byte { return join(data(0, rq, off, off+n), data(replyFlagDone, rq, off, off+n)) }, memferry.ErrTimeout},
		"too little data":         {func(rq request) []byte { return data(replyFlagDone, rq, off, off+512) }, errProtocol},
		"no data":                 {none, errProtocol},
		"another cookie":          {func(rq request) []byte { rq.cookie += 99; return data(replyFlagDone, rq, off, off+n) }, memferry.ErrTimeout},
		"an unknown chunk":        {func(rq request) []byte { return raw(rq, replyFlagDone, 77, 4, make([]byte, 4)) }, memferry.ErrTimeout},
		"a chunk of 4 GiB":        {func(rq request) []byte { return raw(rq, replyFlagDone, chunkOffsetData, 1<<32-1, make([]byte, 64)) }, memferry.ErrTimeout},
		"an error of 4 GiB":       {func(rq request) []byte { return raw(rq, replyFlagDone, chunkError, 1<<32-1, make([]byte, 64)) }, memferry.ErrTimeout},
		"a hole of 4 GiB":         {func(rq request) []byte { return appendOffsetHole(nil, replyFlagDone, rq.cookie, off, 1<<32-1) }, memferry.ErrTimeout},
		"no more than a header":   {func(rq request) []byte { return data(0, rq, off, off+n)[:chunkHeaderLen] }, memferry.ErrTimeout},
		"half of the data":        {func(rq request) []byte { return data(0, rq, off, off+n)[:2000] }, memferry.ErrTimeout},
		"a simple reply": {func(rq request) []byte {
			return append(appendSimpleReply(nil, simpleReply{0, rq.cookie}), make([]byte, n)...)
		}, memferry.ErrTimeout},
		"bytes that are no reply": {func(request) []byte { return []byte(strings.Repeat("garbage!", 100)) }, memferry.ErrTimeout},
		"a block status to a read": {func(rq request) []byte {
			return appendBlockStatus(nil, replyFlagDone, rq.cookie, 7, []statusExtent{{n, 0}})
		}, memferry.ErrTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPeer()
			p.structured = true
			p.answer = func(rq request, _ []byte) ([]byte, bool) {
				return x.reply(rq), x.want != nil && !errors.Is(x.want, EIO)
			}
			c, err := p.client(ClientOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got := make([]byte, n)
			begin := time.Now()
			_, err = c.ReadAt(got, off)
			if !errors.Is(err, x.want) {
				t.Errorf("error %v, want %v", err, x.want)
			}
			if err == nil && !bytes.Equal(got, newPattern(peerSize).data[off:off+n]) {
				t.Error("other data")
			}
			if d := time.Since(begin); d > hang {
				t.Errorf("it took %v", d)
			}
		})
	}
}

// TestDoneContextSendsNothing must hold every time, since what a select picks
// is random.
func TestDoneContextSendsNothing(t *testing.T) {
	p := newPeer()
	p.answer = func(rq request, payload []byte) ([]byte, bool) {
		t.Errorf("%s was sent", commandName(rq.typ))
		return p.serve(rq, payload)
	}
	c, err := p.client(ClientOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	b := make([]byte, 512)
	for range 100 {
		if _, err := c.ReadAtContext(ctx, b, 0); !errors.Is(err, context.Canceled) {
			t.Fatalf("read: %v", err)
		}
		if _, err := c.WriteAtContext(ctx, b, 0); !errors.Is(err, context.Canceled) {
			t.Fatalf("write: %v", err)
		}
	}
}

// FuzzClient lets a server say anything: after a right handshake or instead of
// it. The client must come to an end with each of its calls.
func FuzzClient(f *testing.F) {
	var hello []byte
	for _, option := range []uint32{optStructuredReply, optSetMetaContext, optGo} {
		p := newPeer()
		p.structured = true
		reply, _ := p.option(option)
		hello = append(hello, reply...)
	}
	hello = append(appendGreeting(nil, flagFixedNewstyle|flagNoZeroes), hello...)
	f.Add(false, hello)
	f.Add(false, appendGreeting(nil, 0))
	f.Add(true, append(appendOffsetData(nil, replyFlagDone, 1, 0, 8), "12345678"...))
	f.Add(true, append(appendOffsetHole(nil, 0, 1, 0, 4), appendErrorChunk(nil, 1, EIO, "no")...))
	f.Add(true, append(appendSimpleReply(nil, simpleReply{0, 1}), appendBlockStatus(nil, replyFlagDone, 2, 7, []statusExtent{{512, 3}})...))
	f.Fuzz(func(t *testing.T, greeted bool, said []byte) {
		if greeted {
			said = append(bytes.Clone(hello), said...)
		}
		// The fuzzer does not notice an input that hangs.
		watchdog := time.AfterFunc(hang, func() { panic("the client hangs") })
		defer watchdog.Stop()
		dials := 0
		o := ClientOptions{IOTimeout: 5 * time.Millisecond, HandshakeTimeout: 50 * time.Millisecond, Connections: 1}
		o.Dialer = func(context.Context, string, string) (net.Conn, error) {
			if dials++; dials > 1 {
				return nil, errors.New("no more")
			}
			client, server := net.Pipe()
			go io.Copy(io.Discard, server) //nolint:errcheck // until the client is gone
			return &spoken{client, server, bytes.NewReader(said)}, nil
		}
		c, err := Dial(context.Background(), URI{Host: "peer", Export: "x"}, o)
		if err != nil {
			return
		}
		b := make([]byte, 8)
		_, _ = c.ReadAt(b, 0)
		if e := c.Capabilities().Extenter; e != nil && c.Size() > 0 {
			_, _ = e.Extents(context.Background(), 0, min(c.Size(), 512))
		}
		_, _ = c.WriteAt(b, 0)
		_ = c.Sync()
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

// spoken is a connection to a server that has said it all.
type spoken struct {
	net.Conn
	server net.Conn
	said   io.Reader
}

func (s *spoken) Read(p []byte) (int, error) { return s.said.Read(p) }

func (s *spoken) Close() error { return errors.Join(s.Conn.Close(), s.server.Close()) }
