package uffd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/sys/uffd"
	"github.com/memferry/memferry/region"
)

// helperEnv names, to a helper, the descriptor of its socket.
const helperEnv = "MEMFERRY_UFFD_HELPER_FD"

// Helper serves a memory if [OpenURL] started this process, until the owner
// closes it or is gone; otherwise it returns false at once. A program that uses
// OpenURL calls it first thing in main, with what opens the URLs that it uses,
// and ends when it returns true:
//
//	if helped, err := uffd.Helper(open); helped {
//		return err
//	}
//
// Signals that ask a process to end are ignored meanwhile: whoever ends a whole
// service would otherwise take from the owner what it still has to hand over.
func Helper(open func(ctx context.Context, url string) (memferry.Backend, error)) (helped bool, err error) {
	fd, err := strconv.Atoi(os.Getenv(helperEnv))
	if err != nil {
		mainHelps.Store(true)
		return false, nil
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	_ = os.Unsetenv(helperEnv) // it is not for our own children
	err = help(fd, open)
	if errors.Is(err, unix.EPIPE) || errors.Is(err, io.EOF) {
		return true, nil // the owner went first
	}
	return true, err
}

// help serves one memory until its owner closes it, or is gone.
func help(fd int, open func(ctx context.Context, url string) (memferry.Backend, error)) error {
	c, err := newConn(os.NewFile(uintptr(fd), "owner"))
	if err != nil {
		return err
	}
	defer c.close()
	var first message
	if _, err := c.receive(&first); err != nil {
		return err
	}
	if first.Protocol != protocol {
		return c.send(&message{Protocol: protocol}) // the owner says what is wrong
	}
	// The owner's death ends the opening, too.
	source, err := open(context.Background(), first.URL)
	if err != nil {
		return c.send(&message{Protocol: protocol, Error: encodeError(err)})
	}
	if err := c.send(&message{Protocol: protocol, Size: source.Size(), ReadOnly: memferry.CapabilitiesOf(source).ReadOnly}); err != nil {
		return errors.Join(err, source.Close())
	}
	h := &helper{conn: c}
	if err := h.begin(source, first.Options.options()); err != nil {
		return c.send(&message{Error: encodeError(err)})
	}
	if err := c.send(&message{ReadOnly: h.local.readOnly()}); err != nil {
		return errors.Join(err, h.local.close())
	}
	return h.run()
}

// helper is the helper's side of a memory.
type helper struct {
	conn  *conn
	local *local
	wg    sync.WaitGroup

	mu   sync.Mutex
	asks map[uint64]chan *message // of zap
	next uint64
}

// zap asks the owner to take pages out of its page tables.
func (h *helper) zap(ctx context.Context, page, n int64) ([]region.Run, error) {
	c := make(chan *message, 1)
	h.mu.Lock()
	h.next++
	id := h.next
	if h.asks == nil {
		h.asks = make(map[uint64]chan *message)
	}
	h.asks[id] = c
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.asks, id)
	}()
	if err := h.conn.send(&message{ID: id, Op: opZap, Runs: [][2]int64{{page, n}}}); err != nil {
		return nil, err
	}
	t := time.NewTimer(time.Duration(h.local.patience.Load()))
	defer t.Stop()
	select {
	case a := <-c:
		if a.Late {
			return nil, errZapLate
		}
		var kept []region.Run
		for _, r := range a.Runs {
			kept = append(kept, region.Run{Page: r[0], N: r[1]})
		}
		return kept, a.Error.decode()
	case <-t.C:
		return nil, errZapLate
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// zapped passes on the owner's answer, unless it comes too late.
func (h *helper) zapped(m *message) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.asks[m.ID]; c != nil {
		c <- m // there is room for one, and there is but one answer
		delete(h.asks, m.ID)
	}
}

// begin takes over the memory that the owner has made for the source.
func (h *helper) begin(source memferry.Backend, o Options) error {
	var m message
	fds, err := h.conn.receive(&m)
	if err != nil {
		return errors.Join(err, source.Close())
	}
	land, err := adopt(fds, m)
	if err != nil {
		return errors.Join(err, source.Close())
	}
	land.zap = h.zap
	h.local, err = newLocal(context.Background(), source, land, o)
	return err
}

// adopt maps what the owner sent. The mappings and the descriptor stay until
// the process ends.
func adopt(fds []int, m message) (*landing, error) {
	if len(fds) < 3 || m.Size <= 0 {
		closeAll(fds)
		return nil, fmt.Errorf("the owner sent %d descriptors for %d bytes", len(fds), m.Size)
	}
	fd, err := uffd.FromFD(fds[0], uffd.Feature(m.Features))
	if err != nil {
		closeAll(fds)
		return nil, err
	}
	var tables *uffd.Scanner
	if len(fds) > 3 {
		tables = uffd.ScannerFromFD(fds[3])
	}
	f := files{data: os.NewFile(uintptr(fds[1]), "memory"), state: os.NewFile(uintptr(fds[2]), "state")}
	defer f.close()
	data, err := mapFile(f.data, roundUp(m.Size), unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return nil, err
	}
	state, err := mapFile(f.state, stateSize(m.Size), unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return nil, err
	}
	l := newLanding(fd, uintptr(m.Base), data.data, state.data, m.Size)
	l.tables = tables
	return l, nil
}

// run answers requests until the owner has asked for the end, or is gone.
func (h *helper) run() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for {
		var m message
		if _, err := h.conn.receive(&m); err != nil {
			// The owner is gone. What it had handed over is still pushed.
			cancel()
			return h.local.close()
		}
		if m.Op == opZapped {
			h.zapped(&m)
			continue
		}
		if m.Op == opClose {
			cancel()
			h.wg.Wait()
			return h.conn.send(&message{ID: m.ID, Error: encodeError(h.local.close())})
		}
		h.wg.Go(func() {
			r := h.answer(ctx, &m)
			r.ID = m.ID
			_ = h.conn.send(r) // if the owner is gone, receive says so
		})
	}
}

func (h *helper) answer(ctx context.Context, m *message) *message {
	switch m.Op {
	case opPull:
		return &message{Error: encodeError(h.local.pull(ctx))}
	case opStats:
		s, err := h.local.stats()
		return &message{Stats: &s, Error: encodeError(err)}
	case opWrote:
		pages := int64(len(h.local.land.state))
		for _, r := range m.Runs {
			if err := memferry.CheckRange("write", r[0], r[1], pages); err != nil {
				return &message{Error: encodeError(err)}
			}
			if err := h.local.wrote(r[0], r[1]); err != nil {
				return &message{Error: encodeError(err)}
			}
		}
		return &message{}
	case opDrop:
		if len(m.Runs) != 1 {
			return &message{Error: encodeError(fmt.Errorf("%d ranges to drop", len(m.Runs)))}
		}
		return &message{Error: encodeError(h.local.invalidate(ctx, m.Runs[0][0], m.Runs[0][1]))}
	case opSync:
		return &message{Error: encodeError(h.local.region.Sync())}
	}
	return &message{Error: encodeError(fmt.Errorf("operation %q: %w", m.Op, memferry.ErrNotSupported))}
}

// wireOptions are the Options that a helper needs.
type wireOptions struct {
	ChunkSize int64           `json:"chunk_size"`
	Pull      region.PullMode `json:"pull"`
	IOTimeout time.Duration   `json:"io_timeout"`
	Rate      int64           `json:"rate"`
	ReadOnly  bool            `json:"read_only"`
}

func (w wireOptions) options() Options {
	return Options{ChunkSize: w.ChunkSize, Pull: w.Pull, IOTimeout: w.IOTimeout, Rate: w.Rate, ReadOnly: w.ReadOnly}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// socketpair returns two ends that carry messages and descriptors.
func socketpair() (ours *conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "helper")
	ours, err = newConn(os.NewFile(uintptr(fds[0]), "owner"))
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// newConn takes ownership of f.
func newConn(f *os.File) (*conn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("socket of helper: %T", c)
	}
	return &conn{c: u}, nil
}
