package uffd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/sys/uffd"
	"github.com/memferry/memferry/region"
)

// retryPause is how long a fault waits that can neither be served nor be made
// to fail.
const retryPause = 100 * time.Millisecond

// maxDropped bounds how often in a row a page may become absent again before
// it is shown.
const maxDropped = 1000

// errNoSource is why pages can't arrive once the helper has died.
var errNoSource = errors.New("the process that served the memory has died")

// server answers the faults of one memory from a region. No error ends it but
// that of the descriptor itself.
type server struct {
	fd     *uffd.FD
	stop   int // an eventfd that ends run
	land   *landing
	region *region.Region // nil where there is no source any more
	log    *slog.Logger

	wg     sync.WaitGroup
	active underWay
}

// run serves until stop is signalled. It returns when nothing is being served
// any more; ctx's end makes that soon.
func (s *server) run(ctx context.Context) error {
	defer s.wg.Wait()
	var ms []uffd.Message
	fds := []unix.PollFd{{Fd: int32(s.fd.Fd()), Events: unix.POLLIN}, {Fd: int32(s.stop), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for page faults: %w", err)
		}
		if fds[1].Revents != 0 {
			return nil
		}
		var err error
		ms, err = s.fd.Read(ms[:0])
		if err != nil && !errors.Is(err, uffd.ErrMessage) {
			return err
		}
		for _, m := range ms {
			s.dispatch(ctx, m)
		}
	}
}

// dispatch begins to serve a fault, unless that of the same page is being
// served: a wait that a signal interrupted is reported again.
func (s *server) dispatch(ctx context.Context, m uffd.Message) {
	off := m.Addr - uint64(s.land.base)
	if m.Event != uffd.EventPagefault || off >= uint64(len(s.land.fill)) {
		s.log.Warn("unexpected userfaultfd message", "event", m.Event.String())
		return
	}
	page := int64(off / pageSize)
	if !s.active.begin(uint64(page)) {
		return
	}
	s.wg.Go(func() {
		s.serve(ctx, page)
		s.active.end(uint64(page))
		// Who was reported while we served it, and dropped, tries again.
		if err := s.fd.Wake(s.land.addr(page), pageSize); err != nil && !gone(err) {
			s.log.Error("wake", "error", err)
		}
	})
}

// gone tells that the memory, or its process, is no longer there.
func gone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

// serve makes one page present, or fail.
func (s *server) serve(ctx context.Context, page int64) {
	for dropped := 0; ctx.Err() == nil; {
		err := s.fetch(ctx, page)
		if errors.Is(err, errDropped) && dropped < maxDropped {
			dropped++
			continue
		}
		if err == nil || gone(err) {
			return
		}
		if errors.Is(err, memferry.ErrClosed) || ctx.Err() != nil {
			return
		}
		s.log.Error("a page can't be had", "offset", page*pageSize, "error", err)
		if err = s.land.poison(page); err == nil || gone(err) && s.fd.Features()&uffd.FeaturePoison != 0 {
			return
		}
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
		}
	}
}

func (s *server) fetch(ctx context.Context, page int64) error {
	switch s.land.state[page].Load() {
	case pageShowing, pageLanded: // unmapped since, or reported before it was mapped
		return s.land.reshow(page)
	case pageZero:
		return s.land.landZero(page)
	}
	if s.region == nil {
		return errNoSource
	}
	var b [1]byte
	if _, err := s.region.ReadAtContext(memferry.WithClass(ctx, memferry.ClassDemand), b[:], page*pageSize); err != nil {
		return err
	}
	switch s.land.state[page].Load() {
	case pageShowing, pageLanded:
		return nil
	case pageZero:
		return s.land.landZero(page)
	}
	return fmt.Errorf("the page at %d was read but is not there: %w", page*pageSize, errDropped)
}
