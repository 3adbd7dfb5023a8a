package bench

import (
	"context"
	"fmt"
	"strconv"
	"time"
)

// nbdServer is a server under measurement.
type nbdServer struct {
	name   string
	export string
	start  func(e *Env, at endpoint) (*process, error)
	load   bool // the data has to be copied in first
}

func nbdServers() []nbdServer {
	return []nbdServer{
		{"memferry mem", "d", func(e *Env, at endpoint) (*process, error) {
			return serverAt(at, e.memferry, "serve", "--listen", listenURL(at), fmt.Sprintf("d=mem:?size=%d", e.Size))
		}, true},
		{"memferry file", "d", func(e *Env, at endpoint) (*process, error) {
			path, err := e.copyData("memferry-file")
			if err != nil {
				return nil, err
			}
			return serverAt(at, e.memferry, "serve", "--listen", listenURL(at), "d="+path)
		}, false},
		{"nbdkit memory", "", func(e *Env, at endpoint) (*process, error) {
			return nbdkit(at, "memory", strconv.FormatInt(e.Size, 10))
		}, true},
		{"nbdkit file", "", func(e *Env, at endpoint) (*process, error) {
			path, err := e.copyData("nbdkit-file")
			if err != nil {
				return nil, err
			}
			return nbdkit(at, "file", path)
		}, false},
		{"qemu-nbd", "", func(e *Env, at endpoint) (*process, error) {
			path, err := e.copyData("qemu-file")
			if err != nil {
				return nil, err
			}
			args := []string{"-t", "-e", "32", "-f", "raw"}
			if at.network == "unix" {
				args = append(args, "-k", at.addr)
			} else {
				args = append(args, "-b", "127.0.0.1", "-p", at.port())
			}
			return serverAt(at, "qemu-nbd", append(args, path)...)
		}, false},
		{"go-nbd memory", "", func(e *Env, at endpoint) (*process, error) {
			return serverAt(at, e.gonbd, "-network", at.network, "-addr", at.addr, "-size", strconv.FormatInt(e.Size, 10))
		}, true},
	}
}

// listenURL is what "memferry serve --listen" takes.
func listenURL(at endpoint) string {
	if at.network == "unix" {
		return "nbd+unix:///?socket=" + at.addr
	}
	return "nbd://" + at.addr
}

func nbdkit(at endpoint, args ...string) (*process, error) {
	where := []string{"-f", "-U", at.addr}
	if at.network == "tcp" {
		where = []string{"-f", "-i", "127.0.0.1", "-p", at.port()}
	}
	return serverAt(at, "nbdkit", append(where, args...)...)
}

// randomAt and a depth name the scenarios of random reads.
const randomAt = "4K random read depth "

// NBD compares the servers.
func NBD(ctx context.Context, e *Env) error {
	for _, network := range []string{"unix", "tcp"} {
		if err := e.nbdOver(ctx, network); err != nil {
			return err
		}
	}
	return nil
}

// runningServer is a server with its address.
type runningServer struct {
	nbdServer
	at endpoint
	p  *process
}

func (s *runningServer) uri() string { return s.at.uri(s.export) }

// startServers starts all servers over one network. stop ends them.
func (e *Env) startServers(ctx context.Context, network string) (servers []*runningServer, stop func(), err error) {
	stop = func() {
		for _, s := range servers {
			s.p.stop()
		}
	}
	for _, s := range nbdServers() {
		at, err := e.endpoint(network)
		if err != nil {
			stop()
			return nil, nil, err
		}
		p, err := s.start(e, at)
		if err != nil {
			e.Report.Fail("nbd", network, s.name, err)
			e.logf("%s: %v", s.name, err)
			continue
		}
		servers = append(servers, &runningServer{s, at, p})
		if !s.load {
			continue
		}
		if _, _, err := run(ctx, "nbdcopy", e.data, at.uri(s.export)); err != nil {
			stop()
			return nil, nil, fmt.Errorf("fill %s: %w", s.name, err)
		}
	}
	return servers, stop, nil
}

func (e *Env) nbdOver(ctx context.Context, network string) error {
	if !e.wants("read "+network, "write "+network, randomAt+"1 "+network, randomAt+"32 "+network) {
		return nil
	}
	servers, stop, err := e.startServers(ctx, network)
	if err != nil {
		return err
	}
	defer stop()
	compare := func(scenario string, measure func(context.Context, *runningServer) ([]Value, error)) {
		var subjects []Subject
		for _, s := range servers {
			subjects = append(subjects, Subject{s.name, func(ctx context.Context) ([]Value, error) { return measure(ctx, s) }})
		}
		e.Compare(ctx, "nbd", scenario+" "+network, subjects...)
	}
	compare("read", func(ctx context.Context, s *runningServer) ([]Value, error) {
		return e.withCPU(s.p, func() (time.Duration, error) {
			took, _, err := run(ctx, "nbdcopy", s.uri(), "null:")
			return took, err
		})
	})
	compare("write", func(ctx context.Context, s *runningServer) ([]Value, error) {
		return e.withCPU(s.p, func() (time.Duration, error) {
			took, _, err := run(ctx, "nbdcopy", e.data, s.uri())
			return took, err
		})
	})
	for _, depth := range []string{"1", "32"} {
		compare(randomAt+depth, func(ctx context.Context, s *runningServer) ([]Value, error) {
			v, err := e.fio(ctx, "--ioengine=nbd", "--uri="+s.uri(), "--rw=randread", "--bs=4k", "--iodepth="+depth)
			return only(v, "IOPS", "p50"), err
		})
	}
	return ctx.Err()
}

// withCPU measures a transfer of Size bytes, and what it costs a server.
func (e *Env) withCPU(p *process, transfer func() (time.Duration, error)) ([]Value, error) {
	before, err := p.cpu()
	if err != nil {
		return nil, err
	}
	took, err := transfer()
	if err != nil {
		return nil, err
	}
	after, err := p.cpu()
	gib := float64(e.Size) / (1 << 30)
	return []Value{
		rate("rate", e.Size, took),
		{"server CPU", "s/GiB", Lower, (after - before).Seconds() / gib},
	}, err
}
