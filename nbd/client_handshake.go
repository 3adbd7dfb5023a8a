package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

const (
	// maxOptionReply bounds the data of one reply of a handshake, and
	// maxOptionReplies how many replies one option may have.
	maxOptionReply   = 64 << 10
	maxOptionReplies = 4096

	// keepAlive finds peers that are gone while nothing is under way.
	keepAlive = 5 * time.Second

	clientBuffer = 64 << 10
)

// ExportInfo is what a server says of an export.
type ExportInfo struct {
	Name        string
	Description string
	Size        int64 // bytes
	Flags       TransmissionFlags
	BlockSizes  memferry.BlockSizes // zero where the server said nothing
	Generation  string              // memferry servers only; see memferry.Generationer
	Structured  bool                // replies

	sizes      blockSizes
	allocation bool
	fences     bool   // the server knows fences
	instance   string // see contextInstance; empty where the server has no such name
}

// clientHandshake is a negotiation in progress.
type clientHandshake struct {
	nc  net.Conn
	in  *bufio.Reader
	uri URI
	as  dialing

	noZeroes     bool
	info         ExportInfo
	allocationID uint32
}

// openHandshake dials and reads the greeting. The connection has a deadline, which
// also follows ctx.
func openHandshake(ctx context.Context, uri URI, o ClientOptions) (*clientHandshake, func() bool, error) {
	nc, err := o.Dialer(ctx, uri.Network(), uri.Address())
	if err != nil {
		return nil, nil, fmt.Errorf("nbd: connect to %s: %w", uri, reason(err))
	}
	tuneClient(nc, o)
	if d, ok := ctx.Deadline(); ok {
		_ = nc.SetDeadline(d) // a closed connection says so at the next read
	}
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	h := &clientHandshake{nc: nc, in: bufio.NewReaderSize(nc, clientBuffer), uri: uri}
	h.info.Name = uri.Export
	return h, stop, nil
}

// reason strips what net.OpError repeats: the address.
func reason(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Err
	}
	return err
}

// tuneClient makes TCP notice a dead peer in time.
func tuneClient(nc net.Conn, o ClientOptions) {
	t, ok := nc.(*net.TCPConn)
	if !ok {
		tuneSocket(nc)
		return
	}
	_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: keepAlive, Interval: keepAlive, Count: 3})
	_ = t.SetLinger(0)
	raw, err := t.SyscallConn()
	if err != nil {
		return
	}
	// How long sent bytes may stay unacknowledged (tcp(7)). Errors cost only
	// the time until the watch notices.
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int((o.IOTimeout / stallFraction).Milliseconds()))
	})
}

// dialConn opens a connection and negotiates the export.
func dialConn(parent context.Context, uri URI, o ClientOptions, as dialing) (*clientConn, error) {
	ctx, cancel := context.WithTimeout(parent, o.HandshakeTimeout)
	defer cancel()
	h, stop, err := openHandshake(ctx, uri, o)
	if err != nil {
		return nil, err
	}
	defer stop()
	h.as = as
	if err = h.negotiate(); err == nil && !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		h.nc.Close()
		return nil, h.failed(parent, err)
	}
	_ = h.nc.SetDeadline(time.Time{})
	return newClientConn(h), nil
}

// failed names the server in an error of a handshake, and its cause: ctx is the
// caller's.
func (h *clientHandshake) failed(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		err = context.Cause(ctx)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("server closed the connection during the handshake; is it an NBD server? (%w)", err)
	case ctx.Err() != nil, isTimeout(err):
		err = fmt.Errorf("no handshake in time; is it an NBD server? (%w)", memferry.ErrTimeout)
	}
	return fmt.Errorf("nbd: %s: %w", h.uri, err)
}

// negotiate leads to the transmission phase. An option is sent once the one
// before it has its final reply, as the protocol wants ("Option haggling").
func (h *clientHandshake) negotiate() error {
	flags, err := h.greet()
	if err != nil {
		return err
	}
	client := appendClientFlags(nil, h.clientFlags(flags))
	if flags&flagFixedNewstyle == 0 {
		return h.exportName(client)
	}
	if err := h.structured(client); err != nil {
		return err
	}
	if h.info.Structured { // metadata contexts are of no use without
		if err := h.send(optSetMetaContext, appendMetaRequest(nil, metaRequest{h.uri.Export, []string{contextBase, contextGeneration, contextInstance, contextSession + h.as.id}})); err != nil {
			return err
		}
		if err := h.metaContexts(optSetMetaContext); err != nil {
			return err
		}
	}
	if err := h.fenceBroken(); err != nil {
		return err
	}
	if err := h.send(optGo, appendInfoRequest(nil, infoRequest{h.uri.Export, []uint16{infoTypeBlockSize, infoTypeDescription}})); err != nil {
		return err
	}
	err = h.infoReplies(optGo)
	if errors.Is(err, memferry.ErrNotSupported) {
		return h.exportName(nil)
	}
	return err
}

func (h *clientHandshake) send(option uint32, data []byte) error {
	_, err := h.nc.Write(appendOption(nil, option, data))
	return err
}

func (h *clientHandshake) greet() (uint16, error) {
	var b [greetingLen]byte
	// An oldstyle or foreign server may send less than a whole greeting.
	if _, err := io.ReadFull(h.in, b[:16]); err != nil {
		return 0, err
	}
	if _, err := parseGreeting(b[:]); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(h.in, b[16:]); err != nil {
		return 0, err
	}
	return parseGreeting(b[:])
}

func (h *clientHandshake) clientFlags(server uint16) uint32 {
	var f uint32
	if server&flagFixedNewstyle != 0 {
		f |= flagClientFixedNewstyle
	}
	if server&flagNoZeroes != 0 {
		f |= flagClientNoZeroes
		h.noZeroes = true
	}
	return f
}

// exportName is the old way into transmission. A server that lacks the export
// can only disconnect.
func (h *clientHandshake) exportName(b []byte) error {
	h.info.Structured, h.info.allocation, h.info.Generation, h.info.fences, h.info.instance = false, false, "", false, ""
	if _, err := h.nc.Write(appendOption(b, optExportName, []byte(h.uri.Export))); err != nil {
		return err
	}
	n := exportNameReplyLen
	if !h.noZeroes {
		n += exportNameZeroes
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(h.in, p); err != nil {
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("server has no export %q: %w", h.uri.Export, fs.ErrNotExist)
		}
		return err
	}
	return h.export(parseExportNameReply(p))
}

func (h *clientHandshake) export(r exportNameReply) error {
	if r.size > memferry.MaxSize {
		return protocolErrorf("export of %d bytes", r.size)
	}
	h.info.Size, h.info.Flags = int64(r.size), r.flags
	if !r.flags.Has(FlagHasFlags) {
		h.info.Flags = 0
	}
	return nil
}

// reply reads one reply to option.
func (h *clientHandshake) reply(option uint32) (optionReplyHeader, []byte, error) {
	var b [optionReplyHeaderLen]byte
	if _, err := io.ReadFull(h.in, b[:]); err != nil {
		return optionReplyHeader{}, nil, err
	}
	r, err := parseOptionReplyHeader(b[:])
	if err != nil {
		return r, nil, err
	}
	if r.option != option {
		return r, nil, protocolErrorf("reply to %s, asked was %s", optionName(r.option), optionName(option))
	}
	if r.length > maxOptionReply {
		return r, nil, protocolErrorf("reply of %d bytes to %s", r.length, optionName(option))
	}
	data := make([]byte, r.length)
	_, err = io.ReadFull(h.in, data)
	return r, data, err
}

// each reads the replies to option up to the final one, which it returns.
func (h *clientHandshake) each(option uint32, fn func(typ uint32, data []byte) error) (optionReplyHeader, []byte, error) {
	for range maxOptionReplies {
		r, data, err := h.reply(option)
		if err != nil || r.typ == repAck || r.isError() {
			return r, data, err
		}
		if err := fn(r.typ, data); err != nil {
			return r, nil, err
		}
	}
	return optionReplyHeader{}, nil, protocolErrorf("more than %d replies to %s", maxOptionReplies, optionName(option))
}

// structured asks for structured replies. The client's flags go before that.
func (h *clientHandshake) structured(flags []byte) error {
	if _, err := h.nc.Write(appendOption(flags, optStructuredReply, nil)); err != nil {
		return err
	}
	r, _, err := h.each(optStructuredReply, func(typ uint32, _ []byte) error {
		return protocolErrorf("reply %d to %s", typ, optionName(optStructuredReply))
	})
	h.info.Structured = err == nil && r.typ == repAck
	return err
}

// metaContexts reads the replies to SET or LIST_META_CONTEXT; a refusal means
// that there are none.
func (h *clientHandshake) metaContexts(option uint32) error {
	found := ExportInfo{}
	id := uint32(0)
	r, data, err := h.each(option, func(typ uint32, data []byte) error {
		if typ != repMetaContext {
			return protocolErrorf("reply %d to %s", typ, optionName(option))
		}
		m, err := parseMetaReply(data)
		if err != nil {
			return err
		}
		if m.name == contextBase {
			found.allocation, id = true, m.id
		} else if tag, ok := strings.CutPrefix(m.name, contextGeneration); ok {
			found.Generation = tag
		} else if name, ok := strings.CutPrefix(m.name, contextInstance); ok {
			found.instance = name
		} else if h.as.id != "" && m.name == contextSession+h.as.id {
			found.fences = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	if r.typ == repErrUnknown { // it may be there again by the time of GO
		return h.refused(r.typ, data)
	}
	if r.typ == repAck {
		h.info.allocation, h.allocationID = found.allocation && h.info.Structured, id
		h.info.Generation, h.info.instance, h.info.fences = found.Generation, found.instance, found.fences
	}
	return nil
}

// infoReplies reads the replies to GO or INFO.
func (h *clientHandshake) infoReplies(option uint32) error {
	seen := false
	r, data, err := h.each(option, func(typ uint32, data []byte) error {
		if typ != repInfo {
			return protocolErrorf("reply %d to %s", typ, optionName(option))
		}
		t, err := infoReplyType(data)
		if err != nil {
			return err
		}
		seen = seen || t == infoTypeExport
		return h.infoReply(t, data)
	})
	switch {
	case err != nil:
		return err
	case r.isError():
		return h.refused(r.typ, data)
	case !seen:
		return protocolErrorf("%s without the export's size", optionName(option))
	}
	return nil
}

func (h *clientHandshake) infoReply(typ uint16, data []byte) (err error) {
	switch typ {
	case infoTypeExport:
		var e exportNameReply
		if e, err = parseInfoExport(data); err == nil {
			err = h.export(e)
		}
	case infoTypeDescription:
		h.info.Description, err = parseInfoString(data)
	case infoTypeBlockSize:
		if h.info.sizes, err = parseInfoBlockSize(data); err == nil {
			err = h.info.sizes.valid()
		}
		s := h.info.sizes
		h.info.BlockSizes = memferry.BlockSizes{Min: int64(s.minimum), Preferred: int64(s.preferred), Max: int64(s.maximum)}
	}
	return err
}

// refused turns an error reply to GO, INFO or LIST into an error.
func (h *clientHandshake) refused(typ uint32, data []byte) error {
	say := ""
	if s := strings.ToValidUTF8(cutString(string(data), maxString), "?"); s != "" {
		say = fmt.Sprintf(" (server says: %q)", s)
	}
	switch typ {
	case repErrUnsup:
		return memferry.ErrNotSupported
	case repErrUnknown:
		return fmt.Errorf("server has no export %q: %w; `memferry ls` lists those it has%s", h.uri.Export, fs.ErrNotExist, say)
	case repErrPolicy:
		return fmt.Errorf("server does not allow it: %w%s", fs.ErrPermission, say)
	case repErrTLSReqd:
		return fmt.Errorf("server wants TLS, which this client does not speak yet: %w", memferry.ErrNotSupported)
	case repErrShutdown:
		return fmt.Errorf("%w%s", ESHUTDOWN, say)
	}
	return fmt.Errorf("server refused the export with error %#x%s", typ, say)
}

// query runs f on a short-lived connection that ends with ABORT.
func query(parent context.Context, uri URI, o ClientOptions, f func(*clientHandshake) error) error {
	ctx, cancel := context.WithTimeout(parent, o.HandshakeTimeout)
	defer cancel()
	h, stop, err := openHandshake(ctx, uri, o)
	if err != nil {
		return err
	}
	defer h.nc.Close()
	defer stop()
	flags, err := h.greet()
	if err == nil && flags&flagFixedNewstyle == 0 {
		err = fmt.Errorf("server's handshake is too old to ask it: %w", memferry.ErrNotSupported)
	}
	if err == nil {
		err = h.structured(appendClientFlags(nil, h.clientFlags(flags)))
	}
	if err == nil {
		err = f(h)
	}
	if err != nil {
		return h.failed(parent, err)
	}
	// Politeness: the server may be gone already.
	_, _ = h.nc.Write(appendOption(nil, optAbort, nil))
	return nil
}

// query is query for as long as the client is open.
func (c *Client) query(ctx context.Context, f func(*clientHandshake) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(c.ctx, cancel)
	defer stop()
	err := query(ctx, c.uri, c.opt, f)
	if err != nil && c.ctx.Err() != nil {
		return memferry.ErrClosed
	}
	return err
}

// maxExports bounds what List asks about.
const maxExports = 1024

// List returns the exports of a server, with what it says of each.
func List(ctx context.Context, uri URI, o ClientOptions) ([]ExportInfo, error) {
	o = o.withDefaults()
	var exports []ExportInfo
	err := query(ctx, uri, o, func(h *clientHandshake) error {
		names, err := h.list()
		if err != nil {
			return err
		}
		for _, n := range names {
			x := clientHandshake{nc: h.nc, in: h.in, uri: h.uri}
			x.uri.Export, x.info.Name, x.info.Description = n.name, n.name, n.description
			x.info.Structured = h.info.Structured
			if err := x.ask(); err != nil && !errors.Is(err, memferry.ErrNotSupported) {
				return fmt.Errorf("export %q: %w", n.name, err)
			}
			exports = append(exports, x.info)
		}
		return nil
	})
	return exports, err
}

func (h *clientHandshake) list() ([]serverReply, error) {
	if err := h.send(optList, nil); err != nil {
		return nil, err
	}
	var names []serverReply
	r, data, err := h.each(optList, func(typ uint32, data []byte) error {
		if typ != repServer {
			return protocolErrorf("reply %d to LIST", typ)
		}
		if len(names) == maxExports {
			return fmt.Errorf("server lists more than %d exports", maxExports)
		}
		s, err := parseServerReply(data)
		names = append(names, s)
		return err
	})
	if err == nil && r.isError() {
		err = h.refused(r.typ, data)
		if errors.Is(err, memferry.ErrNotSupported) {
			err = fmt.Errorf("server does not list its exports: %w", err)
		}
	}
	return names, err
}

// ask fills info by INFO.
func (h *clientHandshake) ask() error {
	if err := h.send(optInfo, appendInfoRequest(nil, infoRequest{h.uri.Export, []uint16{infoTypeBlockSize, infoTypeDescription}})); err != nil {
		return err
	}
	return h.infoReplies(optInfo)
}

// Generation asks the server, over a connection of its own, for the tag of the
// export's content; empty where the server knows none.
func (c *Client) Generation(ctx context.Context) (string, error) {
	tag := ""
	err := c.query(ctx, func(h *clientHandshake) error {
		if err := h.send(optListMetaContext, appendMetaRequest(nil, metaRequest{c.uri.Export, []string{contextGeneration}})); err != nil {
			return err
		}
		err := h.metaContexts(optListMetaContext)
		tag = h.info.Generation
		return err
	})
	return tag, err
}
