package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/internal/lifecycle"
	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/nbd"
)

const serveLong = `Offer regions to other hosts over the NBD protocol, until interrupted.

Each argument is a region, with or without the name under which clients ask
for it; without one the name is the last part of its path. The first region is
the default export as well, which clients get that name none. A file whose name
contains "=" is written as ./NAME.

SIGINT and SIGTERM stop taking requests, answer those in flight, write
everything to stable storage, and end. A second signal ends without waiting.

NBD has no encryption and asks nobody who they are: whoever reaches the server
can read and write what it offers. It listens on this host alone unless
--listen says otherwise, and beyond this host only with --insecure.`

const defaultListen = "nbd://127.0.0.1:10809"

// drainTimeout bounds waiting for requests in flight.
const drainTimeout = 30 * time.Second

type serveFlags struct {
	listen      []string
	readOnly    bool
	insecure    bool
	metrics     string
	maxRequest  size.Bytes
	maxMemory   size.Bytes
	connections int
	inFlight    int
	handshake   time.Duration
	poll        time.Duration
	ioTimeout   time.Duration
}

func (a *app) serveCmd() *cobra.Command {
	f := serveFlags{
		listen:      []string{defaultListen},
		maxRequest:  nbd.DefaultMaxRequest,
		maxMemory:   nbd.DefaultMaxMemory,
		connections: nbd.DefaultMaxConnections,
		inFlight:    nbd.DefaultMaxInFlight,
		handshake:   nbd.DefaultHandshakeTimeout,
		poll:        nbd.DefaultPollTime,
		ioTimeout:   openTimeout,
	}
	cmd := &cobra.Command{
		Use:   "serve [NAME=]URL…",
		Short: "Offer regions over NBD",
		Long:  serveLong,
		Example: `  memferry serve disk.img
  memferry serve --read-only iso=/srv/debian.iso scratch='mem:?size=1G'
  memferry serve --listen 'nbd+unix:///?socket=/run/disk.sock' disk.img
  memferry serve --listen nbd://10.0.0.1 --insecure disk=/dev/vg/disk`,
		Args: positional(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			return a.serve(cmd.Context(), args, f)
		},
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&f.listen, "listen", f.listen, "where to listen, as nbd://HOST[:PORT] or nbd+unix:///?socket=PATH; can be repeated")
	fl.BoolVar(&f.readOnly, "read-only", false, "refuse writes")
	fl.BoolVar(&f.insecure, "insecure", false, "allow --listen beyond this host, without encryption")
	fl.StringVar(&f.metrics, "metrics", "", "serve Prometheus metrics at `HOST:PORT`")
	fl.Var(&f.maxRequest, "max-request", "longest read or write")
	fl.Var(&f.maxMemory, "max-memory", "most memory for the data of all requests")
	fl.IntVar(&f.connections, "max-connections", f.connections, "most connections at once")
	fl.IntVar(&f.inFlight, "max-in-flight", f.inFlight, "most requests of one connection at once")
	fl.DurationVar(&f.handshake, "handshake-timeout", f.handshake, "how long a client's handshake may take")
	fl.DurationVar(&f.poll, "poll", f.poll, "how long to look for a client's next request before sleeping; 0: not at all")
	fl.DurationVar(&f.ioTimeout, "io-timeout", f.ioTimeout, "how long a remote backend waits through outages")
	return cmd
}

// check finds limits under which nothing could be served. The server takes
// less than one for "as usual", which is not what somebody means who writes 0.
func (f *serveFlags) check(cmd *cobra.Command) error {
	if f.maxRequest < memferry.PageSize || f.maxRequest > 1<<30 {
		return usage(cmd, "--max-request %v: want 4 KiB to 1 GiB", f.maxRequest)
	}
	if f.maxMemory < f.maxRequest {
		return usage(cmd, "--max-memory %v: want at least --max-request, %v", f.maxMemory, f.maxRequest)
	}
	for _, l := range []struct {
		flag string
		n    int
	}{{"max-connections", f.connections}, {"max-in-flight", f.inFlight}} {
		if l.n < 1 {
			return usage(cmd, "--%s %d: want at least 1", l.flag, l.n)
		}
	}
	if f.poll < 0 || f.poll > maxPoll {
		return usage(cmd, "--poll %v: want 0 to %v", f.poll, maxPoll)
	}
	for _, l := range []struct {
		flag string
		d    time.Duration
	}{{"handshake-timeout", f.handshake}, {"io-timeout", f.ioTimeout}} {
		if l.d <= 0 {
			return usage(cmd, "--%s %v: want a positive duration", l.flag, l.d)
		}
	}
	return nil
}

// maxPoll bounds --poll: for longer, sleeping costs little in comparison.
const maxPoll = 10 * time.Millisecond

// pollTime is for the server, for which 0 means its default.
func (f *serveFlags) pollTime() time.Duration {
	if f.poll == 0 {
		return -1
	}
	return f.poll
}

// splitExport cuts NAME= off an argument of serve. A name has none of the
// characters that a URL has before its first "=".
func splitExport(arg string) (name, url string) {
	name, url, found := strings.Cut(arg, "=")
	if !found || name == "" || strings.ContainsAny(name, ":/?") {
		return "", arg
	}
	return name, url
}

// exportName is what an export is called that the user gave no name.
func exportName(u *backend.URL) string {
	base := path.Base(u.Path)
	if base == "." || base == "/" {
		return u.Scheme
	}
	return base
}

func (a *app) serve(ctx context.Context, args []string, f serveFlags) (err error) {
	var stack lifecycle.Stack
	defer func() {
		hard := a.sig.Hard()
		err = errors.Join(err, stack.Close(hard))
		if hard.Err() != nil {
			err = errors.Join(err, errors.New("stopped without waiting: requests in flight were cut off"))
		}
		if err != nil {
			err = fmt.Errorf("serve: %w", err)
		}
	}()
	server := nbd.NewServer(nbd.ServerOptions{
		MaxRequest:       int(f.maxRequest),
		MaxMemory:        int64(f.maxMemory),
		MaxConnections:   f.connections,
		MaxInFlight:      f.inFlight,
		HandshakeTimeout: f.handshake,
		PollTime:         f.pollTime(),
		Logger:           a.log,
	})
	names, err := a.addExports(ctx, server, &stack, args, f)
	if err != nil {
		return err
	}
	if err := stack.Push("server", drainTimeout, server.Shutdown); err != nil {
		return err
	}
	listeners, err := a.listenAll(&stack, f)
	if err != nil {
		return err
	}
	if f.metrics != "" {
		m, err := startMetrics(f.metrics, a.log, serverCollector(server.Stats))
		if err != nil {
			return err
		}
		if err := stack.Push("metrics", time.Second, m.Close); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		// Not ctx: its end asks for an orderly end, which is Shutdown's.
		g.Go(func() error { return server.Serve(context.WithoutCancel(ctx), l.Listener) })
		for _, n := range names {
			fmt.Fprintf(a.env.Stdout, "serving %s (%s) at %s\n", n.name, size.Format(n.size), l.uri(n.name))
		}
	}
	a.env.Readiness.Ready("")
	<-gctx.Done()
	if ctx.Err() == nil {
		// A listener failed, so the others must end as well.
		return errors.Join(server.Close(), g.Wait())
	}
	a.log.Info("stopping", "why", context.Cause(ctx))
	return nil
}

type served struct {
	name string
	size int64
}

func (a *app) addExports(ctx context.Context, server *nbd.Server, stack *lifecycle.Stack, args []string, f serveFlags) ([]served, error) {
	var names []served
	for _, arg := range args {
		name, url := splitExport(arg)
		u, _, err := a.backends().Lookup(url)
		if err != nil {
			return nil, err
		}
		if name == "" {
			name = exportName(u)
		}
		b, err := a.open(ctx, url, backend.Options{ReadOnly: f.readOnly, IOTimeout: f.ioTimeout})
		if err != nil {
			return nil, err
		}
		readOnly := f.readOnly || memferry.CapabilitiesOf(b).ReadOnly
		err = stack.PushCloser(url, func() error {
			if readOnly {
				return b.Close()
			}
			return errors.Join(b.Sync(), b.Close())
		})
		if err != nil {
			return nil, err
		}
		err = server.Add(nbd.Export{Name: name, Backend: b, ReadOnly: readOnly})
		if errors.Is(err, memferry.ErrInUse) {
			err = withRemedy(err, "give each region a name of its own, as NAME=%s", url)
		}
		if err != nil {
			return nil, err
		}
		names = append(names, served{name, b.Size()})
	}
	return names, nil
}

// listener is a net.Listener with the URI under which clients find it.
type listener struct {
	net.Listener
	at nbd.URI
}

func (l listener) uri(export string) string {
	u := l.at
	u.Export = export
	return u.String()
}

func (a *app) listenAll(stack *lifecycle.Stack, f serveFlags) ([]listener, error) {
	var all []listener
	for _, where := range f.listen {
		l, err := a.listen(where, f.insecure)
		if err != nil {
			return nil, err
		}
		// The server closes its listeners; this is for those it never got.
		err = stack.PushCloser("listener", func() error {
			if err := l.Close(); !errors.Is(err, net.ErrClosed) {
				return err
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

func (a *app) listen(where string, insecure bool) (listener, error) {
	u, err := nbd.ParseURI(where)
	if err != nil {
		return listener{}, withRemedyUnlessSaid(fmt.Errorf("--listen: %w", err), "write nbd://HOST[:PORT] or nbd+unix:///?socket=PATH")
	}
	if u.Export != "" {
		return listener{}, withRemedy(fmt.Errorf("--listen %s: has an export name", where), "name exports as NAME=URL")
	}
	if u.Network() == "unix" {
		l, err := listenUnix(u.Address())
		return listener{l, u}, about(where, err)
	}
	l, err := net.Listen("tcp", u.Address())
	if err != nil {
		return listener{}, fmt.Errorf("--listen %s: %w", where, err)
	}
	addr := l.Addr().(*net.TCPAddr) //nolint:forcetypeassert // that is what Listen("tcp") gives
	u.Port = addr.Port
	if !addr.IP.IsLoopback() {
		if !insecure {
			_ = l.Close()
			return listener{}, withRemedy(fmt.Errorf("--listen %s: NBD has no encryption, and this address is reachable from other hosts", where),
				"use an SSH tunnel to 127.0.0.1, or add --insecure in a network you trust")
		}
		a.log.Warn("NBD has no encryption: everybody who can reach this address can read and write", "addr", addr.String())
	}
	return listener{l, u}, nil
}

// serverCollector exports the statistics of a server.
func serverCollector(take func() nbd.ServerStats) prometheus.Collector {
	type s = nbd.ServerStats
	return &snapshot[s]{
		take: take,
		metrics: []metric[s]{
			gauge("memferry_nbd_connections", "Clients now.", func(v *s) float64 { return float64(v.Connections) }),
			counter("memferry_nbd_connections_total", "Clients ever.", func(v *s) float64 { return float64(v.Accepted) }),
			counter("memferry_nbd_refused_total", "Clients turned away.", func(v *s) float64 { return float64(v.Refused) }),
			gauge("memferry_nbd_in_flight_requests", "Requests that wait for a backend.", func(v *s) float64 { return float64(v.InFlight) }),
			gauge("memferry_nbd_memory_bytes", "Memory that holds data of requests.", func(v *s) float64 { return float64(v.Memory) }),
			counter("memferry_nbd_reads_total", "Reads.", func(v *s) float64 { return float64(v.Reads) }),
			counter("memferry_nbd_writes_total", "Writes.", func(v *s) float64 { return float64(v.Writes) }),
			counter("memferry_nbd_flushes_total", "Flushes.", func(v *s) float64 { return float64(v.Flushes) }),
			counter("memferry_nbd_trims_total", "Trims.", func(v *s) float64 { return float64(v.Trims) }),
			counter("memferry_nbd_zeroes_total", "Write-zeroes requests.", func(v *s) float64 { return float64(v.Zeroes) }),
			counter("memferry_nbd_read_bytes_total", "Bytes sent, holes included.", func(v *s) float64 { return float64(v.ReadBytes) }),
			counter("memferry_nbd_written_bytes_total", "Bytes received.", func(v *s) float64 { return float64(v.WriteBytes) }),
			counter("memferry_nbd_errors_total", "Requests answered with an error.", func(v *s) float64 { return float64(v.Errors) }),
		},
	}
}
