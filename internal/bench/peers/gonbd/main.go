// Command gonbd serves memory with pojntfx/go-nbd, for the benchmarks alone: it
// is a module of its own so that the product does not depend on what it is
// compared with.
package main

import (
	"flag"
	"fmt"
	"net"
	"os"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"
)

func main() {
	network := flag.String("network", "unix", "unix or tcp")
	addr := flag.String("addr", "", "socket path, or host:port")
	size := flag.Int64("size", 1<<30, "bytes")
	flag.Parse()
	if err := serve(*network, *addr, *size); err != nil {
		fmt.Fprintln(os.Stderr, "gonbd:", err)
		os.Exit(1)
	}
}

func serve(network, addr string, size int64) error {
	l, err := net.Listen(network, addr)
	if err != nil {
		return err
	}
	b := backend.NewMemoryBackend(make([]byte, size))
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			// The error is that of a client that went away.
			_ = server.Handle(c, []*server.Export{{Name: "", Backend: b}}, &server.Options{
				MinimumBlockSize: 1, PreferredBlockSize: 4096, MaximumBlockSize: 32 << 20,
				SupportsMultiConn: true,
			})
		}()
	}
}
