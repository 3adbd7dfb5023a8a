package cli

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/internal/lifecycle"
	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/nbd"
	"github.com/memferry/memferry/region"
)

const mountLong = `Make the region at URL a local file, until unmounted or interrupted.

PATH is a file, which then is the region, or a directory, in which the file
appears under the name of the export (or --name). A path that does not exist
is created as a file and removed afterwards.

The file can be used at once. What is read and not local yet is fetched first;
the rest is pulled in the background (--pull=full), or only ahead of sequential
reads (demand), or not at all (none). Writes go to the local side and are
pushed to the remote behind the application's back: every --push-interval,
after --push-idle without a write, and when --push-backlog bytes wait. With
--durability=remote, fsync waits until the remote has stored them.

The local side is memory, unless --cache names a directory: then it is a sparse
file there, and the next mount with the same directory goes on where this one
stopped, also after a crash. With --direct there is no local side at all: every
access goes to the remote. The kernel still caches what was read and written:
with --uncached each read and write goes past that, so that several hosts with
direct mounts of one region see what the others write.

When the connection is lost, access to what is not local waits for
--io-timeout, and then fails with an I/O error; the mount recovers by itself
when the remote is back.

In the foreground, progress is shown on standard error. SIGINT and SIGTERM
push what is dirty, unmount, and end; a second signal ends without waiting, and
says what was lost. With --daemon the command returns once the file can be
used, and the mount goes on in the background until "memferry umount PATH".`

type mountFlags struct {
	direct       bool
	frontend     enum
	cache        string
	readOnly     bool
	pull         enum
	pushInterval time.Duration
	pushIdle     time.Duration
	pushBacklog  size.Bytes
	durability   enum
	chunk        size.Bytes
	rate         rateValue
	ioTimeout    time.Duration
	metrics      string
	daemon       bool
	connections  int
	name         string
	allowOther   bool
	uncached     bool
	logFile      string
}

// rateValue is a size per second.
type rateValue int64

func (r *rateValue) String() string {
	if *r == 0 {
		return ""
	}
	return size.Format(int64(*r)) + "/s"
}

func (r *rateValue) Type() string { return "size/s" }

func (r *rateValue) Set(s string) error {
	n, err := size.Parse(strings.TrimSuffix(s, "/s"))
	if err != nil {
		return err
	}
	*r = rateValue(n)
	return nil
}

func (a *app) mountCmd() *cobra.Command {
	f := mountFlags{
		frontend:     enum{"auto", []string{"auto", "fuse"}},
		pull:         enum{region.PullFull.String(), []string{"full", "demand", "none"}},
		durability:   enum{region.DurabilityLocal.String(), []string{"local", "remote"}},
		pushInterval: region.DefaultPushInterval,
		pushIdle:     region.DefaultPushIdle,
		pushBacklog:  region.DefaultPushBacklog,
		chunk:        region.DefaultChunkSize,
		ioTimeout:    region.DefaultIOTimeout,
	}
	cmd := &cobra.Command{
		Use:   "mount URL PATH",
		Short: "Make a remote region a local file",
		Long:  mountLong,
		Example: `  memferry mount nbd://server/disk /mnt/disk.img
  memferry mount --cache ~/.cache/disk --daemon nbd://server/disk ~/disk.img
  memferry mount --read-only --pull=demand nbd://server/iso /mnt/iso
  memferry mount --direct nbd://server/disk /mnt/disk.img`,
		Args: positional(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			path, err := filepath.Abs(args[1])
			if err != nil {
				return fmt.Errorf("mount: %w", err)
			}
			if f.daemon && !a.env.Readiness.Background() {
				return a.daemonize(cmd.Context(), f)
			}
			if err := a.mount(cmd.Context(), args[0], path, f); err != nil {
				return fmt.Errorf("mount: %w", err)
			}
			return nil
		},
	}
	fl := cmd.Flags()
	fl.BoolVar(&f.direct, "direct", false, "keep nothing locally: each access goes to the remote")
	fl.Var(&f.frontend, "frontend", "how the file is made")
	fl.StringVar(&f.cache, "cache", "", "keep the local side in `DIR`, across mounts")
	fl.BoolVar(&f.readOnly, "read-only", false, "refuse writes")
	fl.Var(&f.pull, "pull", "what to fetch that nobody has asked for yet")
	fl.DurationVar(&f.pushInterval, "push-interval", f.pushInterval, "longest that a write waits to be pushed; negative: until fsync or umount")
	fl.DurationVar(&f.pushIdle, "push-idle", f.pushIdle, "push after so long without a write; negative: never")
	fl.Var(&f.pushBacklog, "push-backlog", "push when so much is dirty")
	fl.Var(&f.durability, "durability", "what fsync waits for")
	fl.Var(&f.chunk, "chunk", "unit of transfer, a power of two")
	fl.Var(&f.rate, "rate", "most that background pulls take, such as 10M/s")
	fl.DurationVar(&f.ioTimeout, "io-timeout", f.ioTimeout, "how long access waits through outages")
	fl.StringVar(&f.metrics, "metrics", "", "serve Prometheus metrics of the region, the client and the process at `HOST:PORT`")
	fl.BoolVar(&f.daemon, "daemon", false, "return once the file can be used, and go on in the background")
	fl.IntVar(&f.connections, "connections", 0, "connections to the server (default 4)")
	fl.StringVar(&f.name, "name", "", "name of the file where PATH is a directory")
	fl.BoolVar(&f.allowOther, "allow-other", false, "let other users in")
	fl.BoolVar(&f.uncached, "uncached", false, "have reads and writes go past the kernel's page cache")
	fl.StringVar(&f.logFile, "log-file", "", "where log lines go with --daemon")
	complete(cmd, "frontend", f.frontend.allowed)
	complete(cmd, "pull", f.pull.allowed)
	complete(cmd, "durability", f.durability.allowed)
	return cmd
}

// check finds what no machine could do.
func (f *mountFlags) check(cmd *cobra.Command) error {
	if c := int64(f.chunk); c < region.MinChunkSize || c > region.MaxChunkSize || c&(c-1) != 0 {
		return usage(cmd, "--chunk %s: want a power of two from %s to %s", size.Format(c), size.Format(region.MinChunkSize), size.Format(region.MaxChunkSize))
	}
	if f.ioTimeout <= 0 {
		return usage(cmd, "--io-timeout %v: want a positive duration", f.ioTimeout)
	}
	if err := checkConnections(cmd, f.connections); err != nil {
		return err
	}
	if f.logFile != "" && !f.daemon {
		return usage(cmd, "--log-file: only with --daemon; in the foreground redirect standard error")
	}
	if !f.direct {
		return nil
	}
	for _, name := range []string{"cache", "pull", "push-interval", "push-idle", "push-backlog", "durability", "chunk", "rate"} {
		if cmd.Flags().Changed(name) {
			return usage(cmd, "--%s: a direct mount has no local side; leave one of them away", name)
		}
	}
	return nil
}

// checkConnections refuses what a client would not open. 0 is its default.
func checkConnections(cmd *cobra.Command, n int) error {
	if n < 0 || n > nbd.MaxConnections {
		return usage(cmd, "--connections %d: want a number from 1 to %d", n, nbd.MaxConnections)
	}
	return nil
}

func (f *mountFlags) options() (mountOptions, error) {
	o := mountOptions{
		direct: f.direct, readOnly: f.readOnly, allowOther: f.allowOther, uncached: f.uncached,
		name: f.name, connections: f.connections,
		region: region.Options{
			ChunkSize:    int64(f.chunk),
			PushInterval: f.pushInterval,
			PushIdle:     f.pushIdle,
			PushBacklog:  int64(f.pushBacklog),
			Rate:         int64(f.rate),
			IOTimeout:    f.ioTimeout,
		},
	}
	var err error
	if o.region.Pull, err = region.ParsePullMode(f.pull.value); err != nil {
		return o, err
	}
	if o.region.Durability, err = region.ParseDurability(f.durability.value); err != nil {
		return o, err
	}
	if f.cache != "" {
		o.cacheDir, err = filepath.Abs(f.cache)
	}
	return o, err
}

// daemonize runs the same command line in the background, and returns when it
// is ready.
func (a *app) daemonize(ctx context.Context, f mountFlags) error {
	_, said, err := lifecycle.Daemon{Args: a.env.Args, LogFile: f.logFile}.Start(ctx)
	if errors.Is(err, lifecycle.ErrDaemon) {
		return err // it has the name of the command in it
	}
	if err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	_, err = fmt.Fprintln(a.env.Stdout, said)
	return err
}

func (a *app) mount(ctx context.Context, url, path string, f mountFlags) error {
	o, err := f.options()
	if err != nil {
		return err
	}
	s, err := a.openSession(ctx, url, path, o)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	limitHeap(s.backend.Size())
	var stack lifecycle.Stack
	err = a.attend(&stack, s, f.metrics)
	if err == nil {
		err = a.runSession(ctx, s)
	}
	// A failure above leaves the session open.
	_, uerr := s.unmount(a.sig.Hard())
	if uerr != nil && !errors.Is(err, uerr) {
		err = errors.Join(err, uerr, s.abort())
	}
	return errors.Join(err, stack.Close(a.sig.Hard()))
}

// attend starts what looks after a session: its control socket and metrics.
func (a *app) attend(stack *lifecycle.Stack, s *session, metrics string) error {
	if err := stack.Push("control socket", 5*time.Second, s.control.Close); err != nil {
		return err
	}
	if metrics == "" {
		return nil
	}
	m, err := startMetrics(metrics, s.log, s.collectors()...)
	if err != nil {
		return err
	}
	return stack.Push("metrics", time.Second, m.Close)
}

// runSession shows the session's progress until it is over or ctx ends, and
// then ends it.
func (a *app) runSession(ctx context.Context, s *session) error {
	said := fmt.Sprintf("mounted %s (%s) at %s", s.url, size.Format(s.backend.Size()), s.device.Path())
	stop := func() {}
	if a.env.Readiness.Background() {
		a.env.Readiness.Ready(said)
	} else {
		fmt.Fprintln(a.env.Stdout, said)
		if s.region != nil {
			stop = a.mountProgress(s)
		}
	}
	defer func() { stop() }()
	err := s.wait(ctx)
	if ctx.Err() == nil {
		return err
	}
	s.log.Info("unmounting", "path", s.path, "why", err)
	return a.unmountPatiently(s)
}

// busyPause is how long to wait before trying again to unmount a file that an
// application holds.
const busyPause = 500 * time.Millisecond

// unmountPatiently unmounts as soon as no application holds the file any more.
// A second signal gives up on that.
func (a *app) unmountPatiently(s *session) error {
	hard := a.sig.Hard()
	stop := context.AfterFunc(hard, s.hurry)
	defer stop()
	told := false
	for {
		sum, err := s.unmount(hard)
		if err == nil {
			s.log.Info("unmounted", "path", s.path, "pushed", sum.Pushed)
			return nil
		}
		if !errors.Is(err, memferry.ErrInUse) && hard.Err() == nil {
			return err
		}
		if !told && hard.Err() == nil {
			told = true
			s.log.Warn("the file is in use: waiting for it to be closed; signal again to end without waiting", "err", err)
		}
		select {
		case <-hard.Done():
			return withRemedy(errors.Join(errors.New("ended without waiting"), s.abort()), "applications that held the file get errors")
		case <-time.After(busyPause):
		}
	}
}

func (a *app) mountProgress(s *session) (stop func()) {
	return startProgress(progress{
		label: "local", out: a.env.Stderr, sink: a.sink, terminal: a.env.isTerminal(a.env.Stderr),
		sample: func() sample {
			st := s.region.Stats()
			pull, push := s.rates.get()
			return sample{st.Present, st.Size, mountNote(st, pull, push)}
		},
	})
}

func mountNote(st region.Stats, pull, push int64) string {
	var parts []string
	if !st.PullComplete {
		parts = append(parts, "pull "+size.Format(pull)+"/s")
	}
	if dirty := st.Dirty + st.Pushing; dirty > 0 || push > 0 {
		parts = append(parts, fmt.Sprintf("dirty %s, push %s/s", size.Format(dirty), size.Format(push)))
	}
	if !st.RemoteUp {
		parts = append(parts, "remote down")
	}
	var n int64
	for _, e := range st.Errors {
		n += e.Count
	}
	if n > 0 {
		parts = append(parts, fmt.Sprintf("%d errors", n))
	}
	return strings.Join(parts, ", ")
}
