package uffd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/region"
)

// local is an engine in this process.
type local struct {
	region *region.Region // nil where there is no source
	land   *landing
	stop   int // an eventfd that ends the server
	cancel context.CancelFunc
	served chan struct{} // closed when the server has ended
	err    error         // why, once served is closed

	patience atomic.Int64 // nanoseconds that dropping pages may hold faults up
}

// newLocal takes ownership of source, also when it fails. Without a source
// everything that has not landed fails.
func newLocal(ctx context.Context, source memferry.Backend, land *landing, o Options) (*local, error) {
	l := &local{land: land, served: make(chan struct{})}
	var err error
	if source != nil {
		if l.region, err = region.Open(ctx, source, land, o.region()); err != nil {
			return nil, err
		}
	}
	if l.stop, err = newEvent(); err != nil {
		return nil, errors.Join(err, l.closeRegion())
	}
	log := o.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &server{fd: land.fd, stop: l.stop, land: land, region: l.region, log: log}
	var serving context.Context
	serving, l.cancel = context.WithCancel(context.Background())
	go func() {
		defer close(l.served)
		l.err = s.run(serving)
	}()
	return l, nil
}

func (l *local) closeRegion() error {
	if l.region == nil {
		return nil
	}
	return l.region.Close()
}

func (l *local) pull(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- l.region.Pull(ctx) }()
	select {
	case err := <-done:
		return err
	case <-l.served:
		if l.err != nil {
			return l.err
		}
		return memferry.ErrClosed
	}
}

func (l *local) stats() (region.Stats, error) { return l.region.Stats(), nil }
func (l *local) readOnly() bool               { return l.region.ReadOnly() }

func (l *local) sync(b Bitmap) error {
	if err := b.Runs(l.wrote); err != nil {
		return err
	}
	return l.region.Sync()
}

// wrote tells the region that pages were written to. It reads them when it
// pushes: here it only has to know. See landing.
func (l *local) wrote(page, n int64) error {
	off := page * pageSize
	_, err := l.region.WriteAt(l.land.fill[off:min(l.land.size, off+n*pageSize)], off)
	return err
}

func (l *local) close() error {
	// This makes calls that wait for a fault return: see server.serve.
	l.cancel()
	errs := []error{l.closeRegion()}
	if err := signalEvent(l.stop); err != nil {
		errs = append(errs, fmt.Errorf("stop the server: %w", err))
	}
	<-l.served
	return errors.Join(append(errs, l.err, unix.Close(l.stop))...)
}
