package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/memferry/memferry"
)

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
