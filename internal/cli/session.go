package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/file"
	"github.com/memferry/memferry/frontend/fuse"
	"github.com/memferry/memferry/internal/control"
	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/nbd"
	"github.com/memferry/memferry/region"
)

// session is one mount, from the opening of the remote to the end of
// everything.
//
// Its states are open, ending, over, in this order; an unmount that fails
// because the file is in use goes back to open.
type session struct {
	url, path, cacheDir string
	identity            string // the URL, whatever the working directory
	readOnly            bool
	started             time.Time
	log                 *slog.Logger

	backend memferry.Backend // the region, or the remote of a direct mount
	client  *nbd.Client      // the remote, where it is one; else nil
	region  *region.Region   // nil for a direct mount
	device  *fuse.Device

	control *control.Server
	rates   *rates
	ready   chan struct{} // closed once the mount is complete, or has failed and device is nil
	over    chan struct{} // closed once nothing is mounted and all is closed

	ending sync.Mutex // held by the one that unmounts; guards what follows
	done   bool
	sum    unmountSummary
	err    error

	mu    sync.Mutex
	state string
}

// mountOptions are what a session is made of.
type mountOptions struct {
	direct      bool
	cacheDir    string
	readOnly    bool
	allowOther  bool
	uncached    bool
	name        string
	connections int
	region      region.Options
}

// openSession opens rawURL, makes a region of it unless the mount is direct, and
// mounts that at path, which is absolute. On failure nothing is left behind.
func (a *app) openSession(ctx context.Context, rawURL, path string, o mountOptions) (s *session, err error) {
	if err := checkMountpoint(path); err != nil {
		return nil, err
	}
	if err := a.checkApart(path, rawURL, o.cacheDir); err != nil {
		return nil, err
	}
	if err := fuse.Probe().Mount; err != nil {
		return nil, fmt.Errorf("%s can't be mounted: %w", path, err)
	}
	remote, err := a.open(ctx, rawURL, backend.Options{
		ReadOnly:    o.readOnly,
		IOTimeout:   o.region.IOTimeout,
		Connections: o.connections,
	})
	if err != nil {
		return nil, err
	}
	s = &session{
		url: rawURL, path: path, identity: a.absolute(rawURL), cacheDir: o.cacheDir, started: time.Now(), log: a.log,
		readOnly: o.readOnly || memferry.CapabilitiesOf(remote).ReadOnly,
		state:    "mounted", ready: make(chan struct{}), over: make(chan struct{}),
	}
	if s.readOnly && !o.readOnly {
		a.log.Info("the remote is read-only, and so is the mount", "url", rawURL)
	}
	s.backend = remote
	s.client, _ = remote.(*nbd.Client)
	if !o.direct {
		if err := s.openRegion(ctx, remote, o); err != nil {
			return nil, about(rawURL, err)
		}
	}
	if err := s.mount(ctx, a.env.controlDirs(), fuse.Options{
		Name:       a.fileName(rawURL, o.name),
		ReadOnly:   s.readOnly,
		AllowOther: o.allowOther,
		Uncached:   o.uncached,
		Logger:     a.log,
	}); err != nil {
		return nil, errors.Join(about(path, err), s.backend.Close())
	}
	return s, nil
}

// mount puts the file in its place. The control socket is there first: whoever
// sees the file can have it unmounted.
func (s *session) mount(ctx context.Context, dirs []string, o fuse.Options) error {
	var err error
	if s.control, err = control.Listen(dirs, s.path, s); err != nil {
		return err
	}
	s.device, err = fuse.Mount(ctx, s.backend, s.path, o)
	if err != nil {
		close(s.ready)
		return errors.Join(err, s.control.Close(ctx))
	}
	s.rates = startRates(s.region)
	go s.watch()
	close(s.ready)
	return nil
}

// mounted waits until the mount is complete.
func (s *session) mounted(ctx context.Context) error {
	select {
	case <-s.ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if s.device == nil {
		return fmt.Errorf("%s: %w", s.path, control.ErrNotMounted)
	}
	return nil
}

// checkMountpoint fails early, before anything is opened, where mounting would
// fail anyway.
func checkMountpoint(path string) error {
	_, err := fuse.ClearStale(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Dir(path)); err != nil {
			return withRemedy(fmt.Errorf("mountpoint %s: its directory does not exist: %w", path, fs.ErrNotExist), "create it with mkdir -p")
		}
		return nil
	}
	return err
}

// openRegion puts a local side under remote. It owns remote, also on failure.
func (s *session) openRegion(ctx context.Context, remote memferry.Backend, o mountOptions) error {
	ro := o.region
	ro.ReadOnly = s.readOnly
	ro.Logger = s.log
	local, err := s.openLocal(remote, &ro)
	if err != nil {
		return errors.Join(err, remote.Close())
	}
	r, err := region.Open(ctx, remote, local, ro)
	if err != nil {
		return err
	}
	s.region, s.backend = r, r
	return nil
}

func (s *session) openLocal(remote memferry.Backend, ro *region.Options) (memferry.Backend, error) {
	if s.cacheDir == "" {
		return file.NewMemfd("memferry", remote.Size())
	}
	return s.openCache(remote, ro)
}

// fileName is the file's name in a directory: what the user said, or the name
// of the export.
func (a *app) fileName(rawURL, name string) string {
	if name != "" {
		return name
	}
	u, _, err := a.backends().Lookup(rawURL)
	if err != nil {
		return ""
	}
	if base := path.Base(u.Path); base != "." && base != "/" {
		return base
	}
	return ""
}

// absolute is url with a relative path in it made absolute, so that it means
// the same next time.
func (a *app) absolute(raw string) string {
	u, _, err := a.backends().Lookup(raw)
	if err != nil || u.Host != "" || u.Path == "" || u.Scheme != "file" && u.Scheme != "dir" {
		return raw
	}
	abs, err := filepath.Abs(u.Path)
	if err != nil {
		return raw
	}
	return (&url.URL{Scheme: u.Scheme, Path: abs, RawQuery: u.Query.Encode()}).String()
}

// watch ends the session when the file was unmounted behind our back.
func (s *session) watch() {
	_ = s.device.Wait(context.Background()) // has no other error than ctx's
	s.ending.Lock()
	defer s.ending.Unlock()
	if !s.done {
		s.log.Info("unmounted from outside", "path", s.path)
		s.finish(time.Now(), s.pushed())
	}
}

// wait returns when the session is over, with what became of it, or with ctx's
// error.
func (s *session) wait(ctx context.Context) error {
	select {
	case <-s.over:
		s.ending.Lock()
		defer s.ending.Unlock()
		return s.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// collectors are the metrics of what the session is made of.
func (s *session) collectors() []prometheus.Collector {
	var all []prometheus.Collector
	if s.region != nil {
		all = append(all, regionCollector(s.region.Stats))
	}
	if s.client != nil {
		all = append(all, clientCollector(s.client.Stats))
	}
	return all
}

func (s *session) stats() region.Stats {
	if s.region == nil {
		return region.Stats{}
	}
	return s.region.Stats()
}

func (s *session) pushed() int64 { return s.stats().PushedBytes }

func (s *session) setState(state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = state
}

// Status implements control.Mount.
func (s *session) Status() any {
	if err := s.mounted(context.Background()); err != nil {
		return mountStatus{Path: s.path, URL: s.url, State: "failed", PID: os.Getpid()}
	}
	return s.status()
}

func (s *session) status() mountStatus {
	s.mu.Lock()
	state := s.state
	s.mu.Unlock()
	st := mountStatus{
		Path: s.path, File: s.device.Path(), URL: s.url, Mode: "direct", Frontend: "fuse",
		State: state, PID: os.Getpid(), Started: s.started, Size: s.backend.Size(),
		ReadOnly: s.readOnly, Cache: s.cacheDir, Passthrough: s.device.Passthrough(),
	}
	if s.region != nil {
		st.Mode = "managed"
		stats := s.region.Stats()
		st.Region = &stats
		st.PullRate, st.PushRate = s.rates.get()
	}
	return st
}

// Sync implements control.Mount: it returns once the remote has what was
// written before.
func (s *session) Sync(ctx context.Context) (any, error) {
	if err := s.mounted(ctx); err != nil {
		return nil, err
	}
	start, before := time.Now(), s.pushed()
	if err := s.device.Sync(); err != nil {
		return nil, err
	}
	if err := s.push(ctx); err != nil {
		return nil, advise(err)
	}
	return s.summary(start, before), nil
}

func (s *session) push(ctx context.Context) error {
	switch {
	case s.readOnly:
		return nil
	case s.region != nil:
		return s.region.Push(ctx)
	}
	return s.backend.Sync()
}

func (s *session) summary(start time.Time, before int64) unmountSummary {
	st := s.stats()
	return unmountSummary{
		Path: s.path, Direct: s.region == nil, Pushed: st.PushedBytes - before, Total: st.PushedBytes,
		Left: st.Dirty + st.Pushing, Seconds: time.Since(start).Seconds(),
	}
}

// Unmount implements control.Mount: it pushes while the file can still be
// used, unmounts, and closes everything.
func (s *session) Unmount(ctx context.Context) (any, error) {
	if err := s.mounted(ctx); err != nil {
		return nil, err
	}
	sum, err := s.unmount(ctx)
	return sum, advise(err)
}

func (s *session) unmount(ctx context.Context) (unmountSummary, error) {
	s.ending.Lock()
	defer s.ending.Unlock()
	if s.done {
		return s.sum, s.err
	}
	s.setState("unmounting")
	start, before := time.Now(), s.pushed()
	// The long part happens before anything is taken away, so that it can be
	// given up and nothing has changed. What fails here is tried again, and
	// then reported, by finish.
	if err := s.push(ctx); err != nil {
		if ctx.Err() != nil {
			s.setState("mounted")
			return unmountSummary{}, fmt.Errorf("%s: %w", s.path, context.Cause(ctx))
		}
		s.log.Warn("push before unmounting", "err", err)
	}
	if err := s.device.Close(); errors.Is(err, memferry.ErrInUse) {
		s.setState("mounted")
		return unmountSummary{}, withRemedyUnlessSaid(about(s.path, err), "close the file and try again")
	} else if err != nil {
		s.err = about(s.path, err)
	}
	s.finish(start, before)
	return s.sum, s.err
}

// finish closes what the device stood on. The lock ending is held.
func (s *session) finish(start time.Time, before int64) {
	s.rates.stop()
	err := s.backend.Close()
	s.sum = s.summary(start, before)
	if s.readOnly {
		s.sum.Left = 0
	}
	switch {
	case s.sum.Left > 0 && s.cacheDir != "":
		s.log.Warn("writes remain in the cache, to be pushed by the next mount", "bytes", s.sum.Left, "cache", s.cacheDir, "err", err)
		err = withRemedy(fmt.Errorf("%s of writes did not reach %s, and remain in %s%s", size.Format(s.sum.Left), s.url, s.cacheDir, because(err)),
			"mount again with the same --cache to push them")
	case s.sum.Left > 0:
		err = withRemedy(fmt.Errorf("lost %s of writes that did not reach %s%s", size.Format(s.sum.Left), s.url, because(err)),
			"use --cache to keep writes through outages")
	case s.cacheDir != "" && errors.Is(err, memferry.ErrNoSpace):
		err = withRemedy(fmt.Errorf("%s is unmounted and no acknowledged write is lost, but: %w", s.path, err),
			"free some space there; what the cache could not record is fetched again by the next mount")
	case err != nil:
		err = fmt.Errorf("close %s: %w", s.url, err)
	}
	s.err = errors.Join(s.err, err)
	s.done = true
	close(s.over)
}

// because is why writes did not reach the remote, for a text that has said that
// they did not.
func because(err error) string {
	if err == nil {
		return ""
	}
	text := err.Error()
	if u := (*region.UnpushedError)(nil); errors.As(err, &u) {
		text = strings.Replace(text, u.Error(), u.Err.Error(), 1)
	}
	return ": " + oneLine(text)
}

// hurry ends all waiting for the remote.
func (s *session) hurry() {
	if s.region != nil {
		s.region.Abandon()
	} else {
		_ = s.backend.Close() // finish closes it again, and has the error
	}
}

// abort ends the session without waiting for applications or the remote, and
// tells what is lost by that.
func (s *session) abort() error {
	s.hurry()
	err := s.device.Abort()
	if werr := s.wait(context.Background()); werr != nil {
		err = errors.Join(err, werr)
	}
	return err
}

// rates keeps the throughput of a region up to date.
type rates struct {
	quit, done chan struct{}
	once       sync.Once

	mu         sync.Mutex
	pull, push int64
}

const rateInterval = 250 * time.Millisecond

func startRates(r *region.Region) *rates {
	t := &rates{quit: make(chan struct{}), done: make(chan struct{})}
	if r == nil {
		close(t.done)
		return t
	}
	go func() {
		defer close(t.done)
		var pull, push meter
		tick := time.NewTicker(rateInterval)
		defer tick.Stop()
		for {
			st, now := r.Stats(), time.Now()
			a, b := pull.update(st.PulledBytes, now), push.update(st.PushedBytes, now)
			t.mu.Lock()
			t.pull, t.push = a, b
			t.mu.Unlock()
			select {
			case <-tick.C:
			case <-t.quit:
				return
			}
		}
	}()
	return t
}

func (t *rates) get() (pull, push int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pull, t.push
}

func (t *rates) stop() {
	t.once.Do(func() { close(t.quit) })
	<-t.done
}
