package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/frontend/uffd"
	"github.com/memferry/memferry/internal/size"
	"github.com/memferry/memferry/region"
)

const uffdHandlerLong = `Give microVMs that are restored from a snapshot their memory from the region at
URL, while they run: what they touch comes first, the rest as it arrives.

The command listens on the UNIX socket PATH and speaks what Firecracker says to
a handler of its page faults (backend_type "Uffd" of PUT /snapshot/load): a list
of its mappings, and its userfaultfd. Pages that the balloon takes away are zero
from then on. Several machines can be served, at once or one after the other;
all share what has arrived, and none of them changes the region.

A machine hangs when its handler dies. So SIGINT and SIGTERM take in no others,
fetch and install what is missing, leave the machines to the kernel, and end; a
second signal ends at once, and leaves them hanging. With --once the command
ends with the first machine.`

type uffdHandlerFlags struct {
	socket    string
	pull      enum
	chunk     size.Bytes
	rate      rateValue
	ioTimeout time.Duration
	machines  int
	once      bool
}

func (a *app) uffdHandlerCmd() *cobra.Command {
	f := uffdHandlerFlags{pull: enum{"full", []string{"full", "demand", "none"}}, chunk: region.DefaultChunkSize, ioTimeout: openTimeout, machines: 64}
	cmd := &cobra.Command{
		Use:   "uffd-handler --socket PATH URL",
		Short: "Give microVMs their memory from a region",
		Long:  uffdHandlerLong,
		Example: `  memferry uffd-handler --socket /run/vm.sock nbd://server/memory
  memferry uffd-handler --socket vm.sock --once --pull=demand snapshot.mem`,
		Args: positional(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.socket == "" {
				return usage(cmd, "--socket: name the path where machines find the handler")
			}
			if f.machines < 1 {
				return usage(cmd, "--max-machines %d: want at least 1", f.machines)
			}
			if err := a.uffdHandler(cmd.Context(), args[0], f); err != nil {
				return fmt.Errorf("uffd-handler: %w", err)
			}
			return nil
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.socket, "socket", "", "UNIX socket to listen on")
	fl.Var(&f.pull, "pull", "what to fetch that nobody has touched yet")
	fl.Var(&f.chunk, "chunk", "unit of transfer, a power of two")
	fl.Var(&f.rate, "rate", "most that background pulls take, such as 10M/s")
	fl.DurationVar(&f.ioTimeout, "io-timeout", f.ioTimeout, "how long a page waits through outages before it fails")
	fl.IntVar(&f.machines, "max-machines", f.machines, "most machines at once")
	fl.BoolVar(&f.once, "once", false, "end with the first machine")
	complete(cmd, "pull", f.pull.allowed)
	return cmd
}

func (a *app) uffdHandler(ctx context.Context, url string, f uffdHandlerFlags) (err error) {
	mode, err := region.ParsePullMode(f.pull.value)
	if err != nil {
		return err
	}
	b, err := a.open(ctx, url, backend.Options{ReadOnly: true, IOTimeout: f.ioTimeout})
	if err != nil {
		return err
	}
	s, err := uffd.NewSource(ctx, b, uffd.Options{
		ChunkSize: int64(f.chunk), Pull: mode, IOTimeout: f.ioTimeout, Rate: int64(f.rate), Logger: a.log,
	})
	if err != nil {
		return about(url, err)
	}
	l, err := listenUnix(f.socket)
	if err != nil {
		return errors.Join(about("--socket "+f.socket, err), s.Close())
	}
	fmt.Fprintf(a.env.Stdout, "serving %s (%s) at %s\n", url, size.Format(s.Size()), f.socket)
	a.env.Readiness.Ready("")
	if f.once {
		f.machines = 1
	}
	h := machines{log: a.log, source: s, slots: make(chan struct{}, f.machines), once: f.once}
	hard := a.sig.Hard()
	cut := context.AfterFunc(hard, func() { s.Close() }) //nolint:errcheck // it is closed below once more
	defer cut()
	err = errors.Join(h.serve(ctx, l), s.Close())
	if hard.Err() != nil {
		err = errors.Join(err, errors.New("stopped without waiting: machines that miss pages hang; end them"))
	}
	return err
}

// machines serves whoever connects.
type machines struct {
	log    *slog.Logger
	source *uffd.Source
	slots  chan struct{} // one for each
	once   bool
}

// serve returns when all machines have ended or, once ctx has, been settled.
func (m *machines) serve(ctx context.Context, l net.Listener) error {
	accepting, stop := context.WithCancel(ctx)
	defer stop()
	unhook := context.AfterFunc(accepting, func() { l.Close() }) //nolint:errcheck // Accept tells
	defer unhook()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case m.slots <- struct{}{}:
		case <-accepting.Done():
			return nil
		}
		c, err := l.Accept()
		if accepting.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer func() { <-m.slots }()
			defer c.Close()
			if m.one(ctx, c) && m.once {
				stop()
			}
		})
	}
}

// one serves a machine, and reports whether it was one.
func (m *machines) one(ctx context.Context, c net.Conn) bool {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	h, err := uffd.ReadHandover(u)
	if err != nil {
		m.log.Warn("a client is no machine", "error", err)
		return false
	}
	m.log.Info("a machine's memory is served", "process", h.PID, "mappings", len(h.Mappings))
	if err := m.source.Serve(ctx, h); err != nil {
		m.log.Error("a machine is no longer served", "process", h.PID, "error", err)
		return false
	}
	m.log.Info("a machine is done", "process", h.PID)
	return true
}
