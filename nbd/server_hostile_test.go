package nbd

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/memferry/memferry"
)

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
