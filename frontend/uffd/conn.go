package uffd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/region"
)

const (
	// maxMessage bounds a message, in bytes: less than what a socket takes.
	maxMessage = 64 << 10
	// maxRuns bounds the runs in one message, far below maxMessage.
	maxRuns = 1024
	// maxFDs bounds the descriptors with one.
	maxFDs = 4
)

// The operations that an owner asks for.
const (
	opPull  = "pull"
	opStats = "stats"
	opWrote = "wrote"
	opSync  = "sync"
	opClose = "close"
	opDrop  = "drop" // Runs: bytes and their number

	// The helper asks the owner this, which answers under the same ID with
	// opZapped: Runs are the pages, and those of them that must stay.
	opZap    = "zap"
	opZapped = "zapped"
)

// message is what owner and helper say to each other. The owner begins with the
// version of the Protocol, a URL and Options; the helper opens it and tells its
// own version, the Size, and whether it is ReadOnly. The owner makes the
// memory and sends Base, Size and Features, with the descriptors of the
// userfaultfd, the memory, its states, and where writes are tracked of the
// owner's page tables; the helper answers once it serves.
// Then each request has an ID, under which it is answered.
type message struct {
	Protocol int           `json:"protocol,omitempty"`
	URL      string        `json:"url,omitempty"`
	Options  wireOptions   `json:"options,omitzero"`
	Size     int64         `json:"size,omitempty"`
	Base     uint64        `json:"base,omitempty"`
	Features uint64        `json:"features,omitempty"`
	ReadOnly bool          `json:"read_only,omitempty"`
	ID       uint64        `json:"id,omitempty"`
	Op       string        `json:"op,omitempty"`
	Runs     [][2]int64    `json:"runs,omitempty"` // pages and their numbers
	Late     bool          `json:"late,omitempty"` // of opZapped: it could not be done in time
	Stats    *region.Stats `json:"stats,omitempty"`
	Error    *wireError    `json:"error,omitempty"`
}

// conn carries messages over a socket of SOCK_SEQPACKET.
type conn struct {
	c  *net.UnixConn
	mu sync.Mutex // one message is sent at a time
}

func (c *conn) close() { c.c.Close() }

func (c *conn) send(m *message, fds ...int) error {
	p, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(p) > maxMessage {
		return fmt.Errorf("message of %d bytes", len(p))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _, err = c.c.WriteMsgUnix(p, oob, nil)
	return err
}

// receive reads a message and the descriptors that came with it; io.EOF says
// that the other side is gone.
func (c *conn) receive(m *message) ([]int, error) {
	p := make([]byte, maxMessage)
	n, fds, err := receive(c.c, p)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		err = io.EOF
	} else if err = json.Unmarshal(p[:n], m); err != nil {
		err = fmt.Errorf("message of the other side: %w", err)
	}
	if err != nil {
		closeAll(fds)
		return nil, err
	}
	return fds, nil
}

// receive reads once into p, and takes the descriptors that came with it.
func receive(c *net.UnixConn, p []byte) (n int, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(4*maxFDs))
	n, k, flags, _, err := c.ReadMsgUnix(p, oob)
	if err != nil {
		return 0, nil, err
	}
	fds, err = rights(oob[:k])
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("message is too long")
	}
	if err != nil {
		closeAll(fds)
		return 0, nil, fmt.Errorf("message of the other side: %w", err)
	}
	return n, fds, nil
}

func rights(oob []byte) (fds []int, err error) {
	cs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for i := range cs {
		f, err := unix.ParseUnixRights(&cs[i])
		if err != nil {
			return fds, err
		}
		fds = append(fds, f...)
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return fds, nil
}

// wireError is an error with as much of its identity as callers ask for.
type wireError struct {
	Text string `json:"text"`
	Kind int    `json:"kind,omitempty"` // 1 + index in kinds
}

var kinds = []error{
	memferry.ErrClosed, memferry.ErrReadOnly, memferry.ErrOutOfRange, memferry.ErrNotSupported, memferry.ErrChanged,
	memferry.ErrTimeout, memferry.ErrCorrupt, memferry.ErrInUse, memferry.ErrNoSpace,
}

// maxErrorText bounds the text of an error in a message, in bytes.
const maxErrorText = 8 << 10

func encodeError(err error) *wireError {
	if err == nil {
		return nil
	}
	e := &wireError{Text: err.Error()}
	e.Text = e.Text[:min(len(e.Text), maxErrorText)]
	for i, k := range kinds {
		if errors.Is(err, k) {
			e.Kind = i + 1
			break
		}
	}
	return e
}

func (e *wireError) decode() error {
	if e == nil {
		return nil
	}
	return e
}

func (e *wireError) Error() string { return e.Text }

func (e *wireError) Unwrap() error {
	if e.Kind < 1 || e.Kind > len(kinds) {
		return nil
	}
	return kinds[e.Kind-1]
}
