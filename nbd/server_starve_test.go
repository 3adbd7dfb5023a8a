package nbd

import (
	"bytes"
	"testing"
	"time"
)

// starving is a server of little memory, whose other limits are out of the
// way.
func starving(t *testing.T) *Server {
	return startServer(t, ServerOptions{
		MaxRequest: testSize, MaxMemory: testSize, StarvedTimeout: 100 * time.Millisecond,
		WriteTimeout: 10 * hang, RequestTimeout: 10 * hang,
	}, Export{Name: "x", Backend: newPattern(testSize)})
}

// stallers are the ways to hold a server's memory.
var stallers = map[string]func(w *wire){
	"reads and takes no replies": func(w *wire) {
		for range 64 {
			w.send(request{typ: cmdRead, length: testSize})
		}
	},
	"sends half a payload": func(w *wire) {
		w.send(request{typ: cmdWrite, length: testSize}, make([]byte, testSize/2)...)
	},
}

func holdMemory(t *testing.T, s *Server, stall func(*wire)) *wire {
	t.Helper()
	w := connect(t, s)
	w.enter("x", false)
	stall(w)
	for deadline := time.Now().Add(hang); s.Stats().Memory == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the client holds no memory")
		}
	}
	return w
}

func TestStalledClientStarvesNobody(t *testing.T) {
	for name, stall := range stallers {
		t.Run(name, func(t *testing.T) {
			s := starving(t)
			stalled := holdMemory(t, s, stall)
			w := connect(t, s)
			w.enter("x", false)
			if a := w.ask(request{typ: cmdRead, length: testSize}); a.errno != 0 || !bytes.Equal(a.data, newPattern(testSize).data) {
				t.Errorf("the other client: error %d, %d bytes", a.errno, len(a.data))
			}
			w.disconnect()
			if err := stalled.ends(); err == nil {
				t.Error("the stalled client left in good order")
			}
			if st := s.Stats(); st.Cut != 1 || st.Memory != 0 {
				t.Errorf("stats %+v", st)
			}
		})
	}
}

// TestStalledClientIsKept: a client that stalls at nobody's cost may take its
// time.
func TestStalledClientIsKept(t *testing.T) {
	for name, stall := range stallers {
		t.Run(name, func(t *testing.T) {
			s := starving(t)
			stalled := holdMemory(t, s, stall)
			time.Sleep(5 * s.opt.StarvedTimeout)
			if st := s.Stats(); st.Cut != 0 || st.Connections != 1 {
				t.Errorf("stats %+v", st)
			}
			_ = stalled.nc.Close()
			<-stalled.done
		})
	}
}
