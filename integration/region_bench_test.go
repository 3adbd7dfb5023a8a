package integration

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	memfd "github.com/memferry/memferry/backend/file"
	"github.com/memferry/memferry/backend/mem"
	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/nbd"
	"github.com/memferry/memferry/region"
)

// BenchmarkPush writes to a region and pushes it over NBD: all of it, or
// pages here and there, which are many small requests.
func BenchmarkPush(b *testing.B) {
	const size = 256 << 20
	for _, rtt := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond} {
		for _, stride := range []int64{1, 128} {
			b.Run(fmt.Sprintf("rtt=%v/every=%d", rtt, stride), func(b *testing.B) {
				r := linkedRegion(b, size, rtt, region.Options{Pull: region.PullNone, PushInterval: -1, PushIdle: -1, PushBacklog: -1})
				p := make([]byte, 4096*stride)
				for i := range p {
					p[i] = byte(i*7 + 1)
				}
				n := int64(len(p))
				b.SetBytes(size / stride)
				for b.Loop() {
					b.StopTimer()
					for off := int64(0); off < size; off += n {
						q := p
						if stride > 1 {
							q = p[:4096]
						}
						if _, err := r.WriteAt(q, off); err != nil {
							b.Fatal(err)
						}
					}
					b.StartTimer()
					if err := r.Push(context.Background()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkPull fills a region over NBD.
func BenchmarkPull(b *testing.B) {
	const size = 256 << 20
	for _, rtt := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond} {
		b.Run(fmt.Sprintf("rtt=%v", rtt), func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				b.StopTimer()
				r := linkedRegion(b, size, rtt, region.Options{})
				b.StartTimer()
				if err := r.Pull(context.Background()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// linkedRegion is a region over NBD, behind a link.
func linkedRegion(b *testing.B, size int64, rtt time.Duration, o region.Options) *region.Region {
	b.Helper()
	dir := b.TempDir()
	remote, err := mem.New(size)
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i*5 + 1)
	}
	for off := int64(0); off < size; off += int64(len(p)) {
		if _, err := remote.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	s := nbd.NewServer(nbd.ServerOptions{})
	if err := s.Add(nbd.Export{Name: "d", Backend: remote}); err != nil {
		b.Fatal(err)
	}
	near, far := filepath.Join(dir, "n"), filepath.Join(dir, "f")
	l, err := net.Listen("unix", near)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	b.Cleanup(func() { cancel(); <-served })
	if rtt > 0 {
		p, err := netsim.Listen(ctx, netsim.UNIX(far), netsim.UNIX(near), netsim.Link{RTT: rtt})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = p.Close() })
	} else {
		far = near
	}
	uri, err := nbd.ParseURI("nbd+unix:///d?socket=" + far)
	if err != nil {
		b.Fatal(err)
	}
	c, err := nbd.Dial(ctx, uri, nbd.ClientOptions{})
	if err != nil {
		b.Fatal(err)
	}
	local, err := memfd.NewMemfd("push", size)
	if err != nil {
		b.Fatal(err)
	}
	r, err := region.Open(ctx, c, local, o)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = r.Close() })
	return r
}
