package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Event is the kind of a message.
type Event uint8

// The events, UFFD_EVENT_*.
const (
	EventPagefault Event = 0x12
	EventFork      Event = 0x13
	EventRemap     Event = 0x14
	EventRemove    Event = 0x15
	EventUnmap     Event = 0x16
)

func (e Event) String() string {
	switch e {
	case EventPagefault:
		return "page fault"
	case EventFork:
		return "fork"
	case EventRemap:
		return "remap"
	case EventRemove:
		return "remove"
	case EventUnmap:
		return "unmap"
	}
	return fmt.Sprintf("event %#x", uint8(e))
}

// Fault tells more of a page fault; zero is a read of an absent page.
type Fault uint64

// The bits of a fault, UFFD_PAGEFAULT_FLAG_*.
const (
	FaultWrite Fault = 1 << 0
	FaultWP    Fault = 1 << 1 // a write to a protected page
	FaultMinor Fault = 1 << 2 // the page is in the page cache
)

// MessageSize is the size of struct uffd_msg, in bytes.
const MessageSize = 32

// Message is something that happened to a registered range. Which fields are
// set depends on the event; addresses are those of the faulting process.
type Message struct {
	Event  Event
	Fault  Fault  // of a page fault
	Thread uint32 // with FeatureThreadID, of a page fault
	// Addr is where the fault was, or where the range began that was moved,
	// removed or unmapped.
	Addr uint64
	To   uint64 // where a range was moved
	Len  uint64 // of a range
	FD   int    // of a fork: the child's userfaultfd, which is now ours to close
}

// ErrMessage is returned for messages that the kernel doesn't send.
var ErrMessage = errors.New("malformed userfaultfd message")

// Decode reads a struct uffd_msg.
func Decode(p []byte) (Message, error) {
	if len(p) < MessageSize {
		return Message{}, fmt.Errorf("%w: %d bytes", ErrMessage, len(p))
	}
	u64 := func(off int) uint64 { return binary.NativeEndian.Uint64(p[off:]) }
	u32 := func(off int) uint32 { return binary.NativeEndian.Uint32(p[off:]) }
	m := Message{Event: Event(p[0])}
	switch m.Event {
	case EventPagefault:
		m.Fault, m.Addr, m.Thread = Fault(u64(8)), u64(16), u32(24)
	case EventFork:
		m.FD = int(int32(u32(8)))
		if m.FD < 0 {
			return Message{}, fmt.Errorf("%w: fork with descriptor %d", ErrMessage, m.FD)
		}
	case EventRemap:
		m.Addr, m.To, m.Len = u64(8), u64(16), u64(24)
	case EventRemove, EventUnmap:
		start, end := u64(8), u64(16)
		if end < start {
			return Message{}, fmt.Errorf("%w: %s of %#x to %#x", ErrMessage, m.Event, start, end)
		}
		m.Addr, m.Len = start, end-start
	default:
		return Message{}, fmt.Errorf("%w: %s", ErrMessage, m.Event)
	}
	return m, nil
}

// maxMessages bounds one read: enough for every thread of a busy process, and
// half a page.
const maxMessages = 64

// Read appends the messages that are waiting to ms, a bounded number of them,
// and never blocks: with none waiting it returns ms as it was. Poll the
// descriptor for more. A message that can't be decoded is an ErrMessage beside
// the others.
func (f *FD) Read(ms []Message) ([]Message, error) {
	var b [maxMessages * MessageSize]byte
	n, err := f.read(b[:])
	if err != nil {
		return ms, err
	}
	var bad error
	for p := b[:n]; len(p) >= MessageSize; p = p[MessageSize:] {
		m, err := Decode(p[:MessageSize])
		if err != nil {
			bad = err
			continue
		}
		ms = append(ms, m)
	}
	return ms, bad
}

func (f *FD) read(p []byte) (int, error) {
	for {
		n, err := unix.Read(f.fd, p)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return 0, nil
		}
		return 0, fmt.Errorf("userfaultfd: read: %w", err)
	}
}
