package uffd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/region"
)

// OpenURL makes the backend that url names available as memory, served by a
// helper. If this program's main has called [Helper], that is the program's
// executable, started once more; otherwise it is the memferry command in PATH,
// which opens the URLs that it takes elsewhere. The bytes can be used at once
// and without restraint: the package's section on deadlocks doesn't apply.
//
// The helper ends with this process, after what Sync handed over has been
// pushed. If it dies before, whatever has not arrived by then fails as if it
// were late; what is there stays, and can be read and written.
//
// Options.Logger gets what concerns this process alone.
func OpenURL(ctx context.Context, url string, o Options) (*Memory, error) {
	m, err := openURL(ctx, url, o)
	if err != nil {
		return nil, fmt.Errorf("uffd: %w", err)
	}
	return m, nil
}

func openURL(ctx context.Context, url string, o Options) (*Memory, error) {
	r, err := startHelper()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, r.abandon)
	m, err := r.open(url, o)
	if !stop() && err != nil {
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		r.abandon()
		return nil, errors.Join(err, r.wait())
	}
	return m, nil
}

// remote is an engine in a helper.
type remote struct {
	conn   *conn
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended

	refuses bool          // the source is read-only
	ended   chan struct{} // closed when the helper no longer answers
	dead    *local        // serves from then on; set before ended is closed
	deadErr error

	mu      sync.Mutex
	next    uint64
	calls   map[uint64]chan *message // nil once nobody answers
	closing bool
}

// open does the first exchanges, and then starts to receive.
func (r *remote) open(url string, o Options) (*Memory, error) {
	var size message
	w := wireOptions{ChunkSize: o.ChunkSize, Pull: o.Pull, IOTimeout: o.IOTimeout, Rate: o.Rate, ReadOnly: o.ReadOnly}
	if err := r.exchange(&message{Protocol: protocol, URL: url, Options: w}, &size); err != nil {
		return nil, err
	}
	if size.Protocol != protocol {
		return nil, errProtocol(size.Protocol)
	}
	m, f, err := open(o, size.Size, size.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.close()
	var ready message
	memory := &message{Base: uint64(address(m.app.data)), Size: m.size, Features: uint64(m.fd.Features())}
	fds := []int{m.fd.Fd(), int(f.data.Fd()), int(f.state.Fd())}
	if m.tracker != nil {
		fds = append(fds, m.tracker.scanner.Fd())
	}
	if err := r.exchange(memory, &ready, fds...); err != nil {
		return nil, errors.Join(err, m.release())
	}
	r.refuses = ready.ReadOnly
	m.engine = r
	go r.receive(m, o)
	return m, nil
}

// exchange is for the time before receive runs.
func (r *remote) exchange(m, answer *message, fds ...int) error {
	err := r.conn.send(m, fds...)
	if err == nil {
		var got []int
		got, err = r.conn.receive(answer)
		closeAll(got)
	}
	if err != nil {
		return fmt.Errorf("%s did not answer as a helper: %w", r.cmd.Path, err)
	}
	return answer.Error.decode()
}

// receive passes answers on until the helper is gone. Then, unless that was
// asked for, it puts something in the helper's place that lets no fault hang.
func (r *remote) receive(memory *Memory, o Options) {
	defer close(r.ended)
	for {
		m := new(message)
		fds, err := r.conn.receive(m)
		closeAll(fds)
		if err != nil {
			break
		}
		if m.Op == opZap {
			if r.zap(memory, m) != nil {
				break
			}
			continue
		}
		r.mu.Lock()
		if c := r.calls[m.ID]; c != nil {
			c <- m // there is room for one, and there is but one answer
			delete(r.calls, m.ID)
		}
		r.mu.Unlock()
	}
	r.mu.Lock()
	closing := r.closing
	for _, c := range r.calls {
		close(c)
	}
	r.calls = nil
	r.mu.Unlock()
	if closing {
		return
	}
	land := memory.landing()
	r.dead, r.deadErr = newLocal(context.Background(), nil, land, o)
	if err := land.fd.Wake(land.base, uintptr(len(land.fill))); err != nil {
		r.deadErr = errors.Join(r.deadErr, err)
	}
}

// zap does what the helper asks for. Nothing else is received meanwhile: it
// takes zapPatience at most.
func (r *remote) zap(memory *Memory, m *message) error {
	answer := &message{ID: m.ID, Op: opZapped}
	var err error
	for _, run := range m.Runs {
		var kept []region.Run
		if err = memferry.CheckRange("zap", run[0], run[1], int64(len(memory.states))); err == nil {
			kept, err = memory.zap(context.Background(), run[0], run[1])
		}
		for _, k := range kept {
			answer.Runs = append(answer.Runs, [2]int64{k.Page, k.N})
		}
	}
	answer.Late, answer.Error = errors.Is(err, errZapLate), encodeError(err)
	return r.conn.send(answer)
}

// call asks the helper for something.
func (r *remote) call(ctx context.Context, m *message) (*message, error) {
	c := make(chan *message, 1)
	r.mu.Lock()
	if r.calls == nil {
		r.mu.Unlock()
		return nil, errNoSource
	}
	r.next++
	m.ID = r.next
	r.calls[m.ID] = c
	r.mu.Unlock()
	if err := r.conn.send(m); err != nil {
		r.forget(m.ID)
		return nil, errors.Join(errNoSource, err)
	}
	select {
	case a, ok := <-c:
		if !ok {
			return nil, errNoSource
		}
		return a, a.Error.decode()
	case <-ctx.Done():
		r.forget(m.ID)
		return nil, ctx.Err()
	}
}

func (r *remote) forget(id uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.calls, id)
}

func (r *remote) pull(ctx context.Context) error {
	_, err := r.call(ctx, &message{Op: opPull})
	return err
}

func (r *remote) stats() (region.Stats, error) {
	a, err := r.call(context.Background(), &message{Op: opStats})
	if err != nil {
		return region.Stats{}, err
	}
	if a.Stats == nil {
		return region.Stats{}, fmt.Errorf("helper: no statistics: %w", memferry.ErrNotSupported)
	}
	return *a.Stats, nil
}

func (r *remote) invalidate(ctx context.Context, off, n int64) error {
	_, err := r.call(ctx, &message{Op: opDrop, Runs: [][2]int64{{off, n}}})
	return err
}

func (r *remote) readOnly() bool { return r.refuses }

func (r *remote) sync(b Bitmap) error {
	m := &message{Op: opWrote}
	flush := func() error {
		_, err := r.call(context.Background(), m)
		m = &message{Op: opWrote}
		return err
	}
	err := b.Runs(func(page, n int64) error {
		m.Runs = append(m.Runs, [2]int64{page, n})
		if len(m.Runs) == maxRuns {
			return flush()
		}
		return nil
	})
	if err == nil && len(m.Runs) > 0 {
		err = flush()
	}
	if err != nil {
		return err
	}
	_, err = r.call(context.Background(), &message{Op: opSync})
	return err
}

func (r *remote) close() error {
	r.mu.Lock()
	r.closing = true
	r.mu.Unlock()
	_, err := r.call(context.Background(), &message{Op: opClose})
	r.conn.close()
	<-r.ended
	errs := []error{err, r.deadErr}
	if r.dead != nil {
		errs = append(errs, r.dead.close())
	}
	return errors.Join(append(errs, r.wait())...)
}

// abandon makes the helper end, which it does on the end of the socket.
func (r *remote) abandon() { r.conn.close() }

// helperGrace is how long a helper may take to end once its socket is closed;
// it may be in the middle of opening a source.
const helperGrace = 5 * time.Second

func (r *remote) wait() error {
	select {
	case <-r.exited:
		return nil
	case <-time.After(helperGrace):
	}
	err := r.cmd.Process.Kill()
	<-r.exited
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}
