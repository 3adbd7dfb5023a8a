package nbd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// errLeft says that the client took its leave.
var errLeft = errors.New("client left")

// handshakeDrain is how much data of refused options is read to keep in step,
// over a whole handshake, before the client is cut off instead.
const handshakeDrain = 1 << 20

// handshake is the state of option haggling ("Fixed newstyle negotiation").
type handshake struct {
	c          *serverConn
	ctx        context.Context
	noZeroes   bool
	structured bool
	metaExport *export // that contexts are of
	contexts   []metaContext
	drained    int64
}

// metaContext is a metadata context that the client selected; its ID is its
// place in the list plus one.
type metaContext struct {
	name string
	kind metaKind
}

type metaKind uint8

const (
	metaAllocation metaKind = iota
	metaGeneration
	metaSession
	metaFence
	metaInstance
)

// negotiate runs the handshake. It returns nil when the client has chosen an
// export, which is then set on the connection.
func (c *serverConn) negotiate() error {
	ctx, cancel := context.WithTimeout(c.ctx, c.srv.opt.HandshakeTimeout)
	defer cancel()
	// One deadline for all of it: a client that sends a byte now and then
	// gains nothing.
	if err := c.nc.SetDeadline(time.Now().Add(c.srv.opt.HandshakeTimeout)); err != nil {
		return err
	}
	h := &handshake{c: c, ctx: ctx}
	if err := h.greet(); err != nil {
		return err
	}
	for range c.srv.opt.MaxOptions {
		done, err := h.option()
		if err != nil {
			return err
		}
		if done {
			return c.nc.SetDeadline(time.Time{})
		}
	}
	return protocolErrorf("more than %d options", c.srv.opt.MaxOptions)
}

func (h *handshake) greet() error {
	if err := h.send(appendGreeting(nil, flagFixedNewstyle|flagNoZeroes)); err != nil {
		return err
	}
	if err := h.c.in.need(clientFlagsLen); err != nil {
		return err
	}
	flags := parseClientFlags(h.c.in.take(clientFlagsLen))
	if unknown := flags &^ (flagClientFixedNewstyle | flagClientNoZeroes); unknown != 0 {
		return protocolErrorf("unknown client flags %#x", unknown)
	}
	h.noZeroes = flags&flagClientNoZeroes != 0
	return nil
}

func (h *handshake) send(b []byte) error {
	_, err := h.c.nc.Write(b)
	return err
}

// option reads and answers one option; done means that transmission begins.
func (h *handshake) option() (done bool, err error) {
	in := h.c.in
	if err := in.need(optionHeaderLen); err != nil {
		return false, err
	}
	o, err := parseOptionHeader(in.take(optionHeaderLen))
	if err != nil {
		return false, err
	}
	if int64(o.length) > int64(h.c.srv.opt.MaxOptionLength) {
		return false, h.refuseLong(o)
	}
	data := make([]byte, o.length)
	if err := in.full(data, func() {}); err != nil {
		return false, err
	}
	return h.answer(o.option, data)
}

// refuseLong answers an option that is not read into memory.
func (h *handshake) refuseLong(o optionHeader) error {
	h.drained += int64(o.length)
	if o.option == optExportName || h.drained > handshakeDrain {
		return protocolErrorf("%s with %d bytes of data, limit %d", optionName(o.option), o.length, h.c.srv.opt.MaxOptionLength)
	}
	if err := h.c.in.discard(int64(o.length)); err != nil {
		return err
	}
	return h.fail(o.option, repErrTooBig, fmt.Sprintf("option data of %d bytes, limit %d", o.length, h.c.srv.opt.MaxOptionLength))
}

func (h *handshake) answer(option uint32, data []byte) (done bool, err error) {
	if h.c.isDraining() && option != optAbort && option != optExportName {
		return false, h.fail(option, repErrShutdown, "server is shutting down")
	}
	switch option {
	case optExportName:
		return true, h.exportName(data)
	case optAbort:
		// The client may be gone already; either way it has left.
		_ = h.send(appendOptionReply(nil, option, repAck, nil))
		return false, errLeft
	case optList:
		return false, h.list(data)
	case optInfo, optGo:
		return h.info(option, data)
	case optStructuredReply:
		return false, h.structuredReply(data)
	case optListMetaContext, optSetMetaContext:
		return false, h.metaContext(option, data)
	case optStartTLS:
		return false, h.fail(option, repErrUnsup, "no TLS on this server")
	}
	return false, h.fail(option, repErrUnsup, optionName(option)+" is not supported")
}

func (h *handshake) fail(option, typ uint32, message string) error {
	return h.send(appendOptionReply(nil, option, typ, []byte(cutString(message, maxString))))
}

// exportName enters transmission or, since it has no way to say no, cuts the
// connection.
func (h *handshake) exportName(data []byte) error {
	name := string(data)
	if err := h.checkName(name); err != nil {
		return err
	}
	x := h.c.srv.find(name)
	if x == nil || h.c.isDraining() {
		return fmt.Errorf("no export %q", name)
	}
	h.enter(x)
	return h.send(appendExportNameReply(nil, exportNameReply{uint64(x.size), h.flags(x)}, h.noZeroes))
}

func (h *handshake) checkName(name string) error {
	if len(name) > h.c.srv.opt.MaxExportNameLength {
		return protocolErrorf("export name of %d bytes, limit %d", len(name), h.c.srv.opt.MaxExportNameLength)
	}
	return checkString("export name", name)
}

// flags are the transmission flags for this connection.
func (h *handshake) flags(x *export) TransmissionFlags {
	if h.structured {
		return x.flags | FlagSendDF
	}
	return x.flags
}

// enter fixes what was negotiated.
func (h *handshake) enter(x *export) {
	c := h.c
	c.structured = h.structured
	c.flags = h.flags(x)
	// Contexts of another export than the one chosen count as not selected.
	if h.metaExport == x {
		c.contexts = h.contexts
		c.session = sessionOf(h.contexts) // before setExport publishes it
	}
	c.setExport(x)
}

func (h *handshake) list(data []byte) error {
	if len(data) != 0 {
		return h.fail(optList, repErrInvalid, "LIST takes no data")
	}
	var b []byte
	for _, x := range h.c.srv.list() {
		b = appendOptionReply(b, optList, repServer, appendServerReply(nil, serverReply{x.Name, x.Description}))
	}
	return h.send(appendOptionReply(b, optList, repAck, nil))
}

func (h *handshake) info(option uint32, data []byte) (done bool, err error) {
	r, err := parseInfoRequest(data)
	if err == nil {
		err = h.checkName(r.name)
	}
	if err != nil {
		return false, h.fail(option, repErrInvalid, err.Error())
	}
	x := h.c.srv.find(r.name)
	if x == nil {
		return false, h.fail(option, repErrUnknown, fmt.Sprintf("no export %q", cutString(r.name, 256)))
	}
	if m := h.metaExport; option == optGo && m != nil && m != x && m.Name == x.Name {
		// Its contexts, the instance among them, are of one that is gone.
		return false, h.fail(option, repErrUnknown, "the export was replaced; connect again")
	}
	b := appendOptionReply(nil, option, repInfo, appendInfoExport(nil, exportNameReply{uint64(x.size), h.flags(x)}))
	for _, i := range r.infos {
		switch i {
		case infoTypeName:
			b = appendOptionReply(b, option, repInfo, appendInfoString(nil, i, x.Name))
		case infoTypeDescription:
			if x.Description != "" {
				b = appendOptionReply(b, option, repInfo, appendInfoString(nil, i, x.Description))
			}
		case infoTypeBlockSize:
			b = appendOptionReply(b, option, repInfo, appendInfoBlockSize(nil, x.sizes))
		}
		if len(b) > h.c.srv.opt.MaxOptionLength {
			// Each type may be asked for once.
			return false, h.fail(option, repErrTooBig, "too many information requests")
		}
	}
	b = appendOptionReply(b, option, repAck, nil)
	if option == optGo {
		h.enter(x)
	}
	return option == optGo, h.send(b)
}

func (h *handshake) structuredReply(data []byte) error {
	if len(data) != 0 {
		return h.fail(optStructuredReply, repErrInvalid, "STRUCTURED_REPLY takes no data")
	}
	h.structured = true
	return h.send(appendOptionReply(nil, optStructuredReply, repAck, nil))
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (h *handshake) metaContext(option uint32, data []byte) error {
	set := option == optSetMetaContext
	if set {
		// Also where the option fails.
		h.metaExport, h.contexts = nil, nil
	}
	if !h.structured {
		return h.fail(option, repErrInvalid, "metadata contexts need structured replies")
	}
	r, err := parseMetaRequest(data, h.c.srv.opt.MaxMetaContexts)
	if err == nil {
		err = h.checkName(r.export)
	}
	if errors.Is(err, errTooMany) {
		return h.fail(option, repErrTooBig, err.Error())
	}
	if err != nil {
		return h.fail(option, repErrInvalid, err.Error())
	}
	x := h.c.srv.find(r.export)
	if x == nil {
		return h.fail(option, repErrUnknown, fmt.Sprintf("no export %q", cutString(r.export, 256)))
	}
	named, err := h.named(x, r.queries, set)
	if err != nil {
		return h.fail(option, repErrPolicy, err.Error())
	}
	chosen := append(h.choose(x, r.queries, set), named...)
	var b []byte
	for i, m := range chosen {
		id := uint32(0)
		if set {
			id = uint32(i) + 1
		}
		b = appendOptionReply(b, option, repMetaContext, appendMetaReply(nil, metaReply{id, m.name}))
	}
	if set {
		h.metaExport, h.contexts = x, chosen
	}
	return h.send(appendOptionReply(b, option, repAck, nil))
}

// choose returns the contexts of x that match one of the queries. A list
// matches wildcards too, and all without queries.
func (h *handshake) choose(x *export, queries []string, set bool) []metaContext {
	var chosen []metaContext
	for _, m := range h.available(x, queries, set) {
		match := !set && len(queries) == 0
		for _, q := range queries {
			match = match || matchContext(m, q, set)
		}
		if match {
			chosen = append(chosen, m)
		}
	}
	return chosen
}

func matchContext(m metaContext, query string, set bool) bool {
	if query == m.name {
		return true
	}
	switch m.kind {
	case metaAllocation:
		return !set && query == namespaceBase
	case metaGeneration:
		return query == contextGeneration || !set && query == namespaceExper
	}
	return false
}

// available returns the contexts that x has. The generation, which a backend
// may have to ask a remote for, is left out where nobody wants it.
func (h *handshake) available(x *export, queries []string, set bool) []metaContext {
	var all []metaContext
	if x.caps.Extenter != nil {
		all = append(all, metaContext{contextBase, metaAllocation})
	}
	wanted := !set && len(queries) == 0
	for _, q := range queries {
		wanted = wanted || strings.HasPrefix(q, namespaceExper)
	}
	if x.caps.Generationer == nil || !wanted {
		return all
	}
	tag, err := x.caps.Generationer.Generation(h.ctx)
	if err != nil {
		h.c.srv.complain("generation of export", "export", x.Name, "err", err)
		return all
	}
	name := contextGeneration + tag
	if tag == "" || checkString("generation", name) != nil {
		return all
	}
	return append(all, metaContext{name, metaGeneration})
}
