package uffd

import (
	"encoding/binary"
	"errors"
	"testing"
)

// message builds a struct uffd_msg: an event, and four words from offset 8,
// of which the last is never used.
func message(event Event, words ...uint64) []byte {
	p := make([]byte, MessageSize)
	p[0] = byte(event)
	for i, w := range words {
		binary.NativeEndian.PutUint64(p[8+8*i:], w)
	}
	return p
}

func TestDecode(t *testing.T) {
	for _, tt := range []struct {
		name string
		p    []byte
		want Message
		bad  bool
	}{
		{name: "fault", p: message(EventPagefault, 5, 0x7000, 42), want: Message{Event: EventPagefault, Fault: FaultWrite | FaultMinor, Addr: 0x7000, Thread: 42}},
		{name: "fork", p: message(EventFork, 9), want: Message{Event: EventFork, FD: 9}},
		{name: "fork without descriptor", p: message(EventFork, 0xFFFFFFFF), bad: true},
		{name: "remap", p: message(EventRemap, 0x1000, 0x8000, 0x2000), want: Message{Event: EventRemap, Addr: 0x1000, To: 0x8000, Len: 0x2000}},
		{name: "remove", p: message(EventRemove, 0x1000, 0x3000), want: Message{Event: EventRemove, Addr: 0x1000, Len: 0x2000}},
		{name: "unmap", p: message(EventUnmap, 0x1000, 0x3000), want: Message{Event: EventUnmap, Addr: 0x1000, Len: 0x2000}},
		{name: "reversed", p: message(EventRemove, 0x3000, 0x1000), bad: true},
		{name: "unknown", p: message(0x17), bad: true},
		{name: "short", p: message(EventPagefault)[:MessageSize-1], bad: true},
		{name: "empty", bad: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := Decode(tt.p)
			if errors.Is(err, ErrMessage) != tt.bad {
				t.Fatalf("error %v, want one: %v", err, tt.bad)
			}
			if m != tt.want {
				t.Errorf("%+v, want %+v", m, tt.want)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(message(EventPagefault, 1, 0x1000, 1))
	f.Add(message(EventFork, 3))
	f.Add(message(EventRemap, 1, 2, 3))
	f.Add(message(EventUnmap, 1, 2))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := Decode(p)
		if err != nil {
			if !errors.Is(err, ErrMessage) || m != (Message{}) {
				t.Fatalf("%+v, %v", m, err)
			}
			return
		}
		if m.FD < 0 || m.Len > 1<<63 && m.Event == EventUnmap && m.Addr+m.Len < m.Addr {
			t.Fatalf("%+v", m)
		}
	})
}
