package uffd

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
)

const (
	// maxHandover bounds a hand-over, in bytes.
	maxHandover = 64 << 10
	// maxMappings bounds the mappings in it.
	maxMappings = 256
	// handoverTimeout is how long it may take.
	handoverTimeout = 10 * time.Second
)

// Mapping is a part of another process's memory.
type Mapping struct {
	Addr     uint64 `json:"base_host_virt_addr"` // in that process
	Size     int64  `json:"size"`                // bytes
	Offset   int64  `json:"offset"`              // of its bytes in the source
	PageSize int64  `json:"page_size"`           // bytes: 4096, or that of hugetlbfs
}

func (m Mapping) end() uint64 { return m.Addr + uint64(m.Size) }

// Handover is memory that a process has registered with a userfaultfd for
// missing pages, to have it filled by somebody else.
type Handover struct {
	FD       int // the userfaultfd
	Mappings []Mapping
	PID      int // of the process, whose end is noticed; 0: unknown
}

// check returns the mappings in order.
func (h *Handover) check(size int64) ([]*mapped, error) {
	if name, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(h.FD)); err != nil || name != "anon_inode:[userfaultfd]" {
		return nil, fmt.Errorf("descriptor %d (%s) is no userfaultfd", h.FD, name)
	}
	if n := len(h.Mappings); n == 0 || n > maxMappings {
		return nil, fmt.Errorf("%d mappings: want 1 to %d", n, maxMappings)
	}
	var all []*mapped
	for _, m := range h.Mappings {
		if err := m.check(size); err != nil {
			return nil, err
		}
		all = append(all, &mapped{Mapping: m, removed: make(Bitmap, (m.Size/m.PageSize+63)/64)})
	}
	slices.SortFunc(all, func(a, b *mapped) int { return cmp.Compare(a.Addr, b.Addr) })
	for i, m := range all[1:] {
		if all[i].end() > m.Addr {
			return nil, fmt.Errorf("mappings at %#x and %#x overlap", all[i].Addr, m.Addr)
		}
	}
	return all, nil
}

func (m *Mapping) check(size int64) error {
	if m.PageSize != pageSize && m.PageSize != hugeSize {
		return fmt.Errorf("mapping at %#x: pages of %d bytes: want %d or %d: %w", m.Addr, m.PageSize, pageSize, hugeSize, memferry.ErrNotSupported)
	}
	if m.Size <= 0 || m.Offset < 0 || m.Addr > math.MaxInt64 || m.Addr%uint64(m.PageSize) != 0 || m.Size%m.PageSize != 0 ||
		m.Offset%pageSize != 0 {
		return fmt.Errorf("mapping of %d bytes at %#x, offset %d: not made of whole pages", m.Size, m.Addr, m.Offset)
	}
	if end := roundUp(size); m.Size > end || m.Offset > end-m.Size {
		return fmt.Errorf("mapping of %d bytes at offset %d: the source has %d: %w", m.Size, m.Offset, size, memferry.ErrOutOfRange)
	}
	return nil
}

// ReadHandover receives what Firecracker sends to the handler of its page
// faults: one message with the JSON list of its mappings and, by SCM_RIGHTS, the
// userfaultfd. See docs/snapshotting/handling-page-faults-on-snapshot-resume.md
// of Firecracker. The caller closes the descriptor, and keeps c open, since
// Firecracker does.
func ReadHandover(c *net.UnixConn) (Handover, error) {
	h, err := readHandover(c)
	if err != nil {
		return Handover{}, fmt.Errorf("hand-over: %w", err)
	}
	return h, nil
}

func readHandover(c *net.UnixConn) (h Handover, err error) {
	if err := c.SetReadDeadline(time.Now().Add(handoverTimeout)); err != nil {
		return h, err
	}
	p := make([]byte, maxHandover)
	n, fds, err := receive(c, p)
	if err != nil {
		return h, err
	}
	if len(fds) != 1 {
		err = fmt.Errorf("%d descriptors: want one, the userfaultfd", len(fds))
	}
	if err == nil {
		err = h.decode(c, p, n)
	}
	if err == nil {
		h.PID, err = peer(c)
	}
	if err != nil {
		closeAll(fds)
		return h, err
	}
	h.FD = fds[0]
	return h, nil
}

// decode reads the mappings, of which p holds the first n bytes.
func (h *Handover) decode(c io.Reader, p []byte, n int) error {
	for !json.Valid(p[:n]) {
		if n == len(p) {
			return fmt.Errorf("no JSON in the first %d bytes", n)
		}
		k, err := c.Read(p[n:])
		if err != nil {
			return fmt.Errorf("%d bytes that are no JSON: %w", n, err)
		}
		n += k
	}
	var wire []struct {
		Mapping
		// Of old versions; bytes all the same.
		Old int64 `json:"page_size_kib"`
	}
	if err := json.NewDecoder(bytes.NewReader(p[:n])).Decode(&wire); err != nil {
		return err
	}
	for _, w := range wire {
		w.PageSize = cmp.Or(w.PageSize, w.Old, pageSize)
		h.Mappings = append(h.Mappings, w.Mapping)
	}
	return nil
}

// peer returns the process at the other end.
func peer(c *net.UnixConn) (pid int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, fmt.Errorf("who is there: %w", err)
	}
	return int(cred.Pid), nil
}
