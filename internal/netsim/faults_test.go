package netsim

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
)

func TestReset(t *testing.T) {
	ended := make(chan error, 1)
	target := server(t, TCP("127.0.0.1:0"), func(c net.Conn) {
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	p := proxy(t, target, Link{})
	c := dial(t, p)
	for up := int64(0); up == 0; up, _ = p.Bytes() {
		c.Write([]byte("x"))
		time.Sleep(time.Millisecond)
	}
	p.Reset()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client: %v, want ECONNRESET", err)
	}
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("server: %v, want ECONNRESET", err)
	}
}

// A server that dies with unread data resets its connections; the client must
// see that, and not an orderly end.
func TestResetOfTheServerTravels(t *testing.T) {
	target := server(t, TCP("127.0.0.1:0"), func(c net.Conn) {
		c.Read(make([]byte, 1))
		closeReset(c)
	})
	c := dial(t, proxy(t, target, Link{RTT: 2 * time.Millisecond}))
	c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client: %v, want ECONNRESET", err)
	}
}

func TestBlackhole(t *testing.T) {
	eachNetwork(t, func(t *testing.T, target Addr) {
		p := proxy(t, target, Link{RTT: time.Millisecond})
		c := dial(t, p)
		roundTrip(t, c, 10)
		p.Blackhole(true)
		fresh := dial(t, p)
		for _, c := range []net.Conn{c, fresh} {
			if _, err := c.Write([]byte("later")); err != nil {
				t.Fatal(err)
			}
		}
		silent(t, c)
		silent(t, fresh)
		p.Blackhole(false)
		for _, c := range []net.Conn{c, fresh} {
			got := make([]byte, 5)
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "later" {
				t.Errorf("after the outage: %q, %v", got, err)
			}
			roundTrip(t, c, 1<<20)
		}
	})
}

func TestBlackholeUnderLoad(t *testing.T) {
	target := server(t, TCP("127.0.0.1:0"), echo)
	p := proxy(t, target, Link{RTT: time.Millisecond})
	c := dial(t, p)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for on := true; ; on = !on {
			select {
			case <-stop:
				p.Blackhole(false)
				return
			case <-time.After(5 * time.Millisecond):
				p.Blackhole(on)
			}
		}
	})
	checkStream(t, c, 7, 32<<20)
	close(stop)
	wg.Wait()
}

func TestHalfOpen(t *testing.T) {
	ended := make(chan error, 2)
	target := server(t, TCP("127.0.0.1:0"), func(c net.Conn) {
		_, err := io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		ended <- err
	})
	p := proxy(t, target, Link{})
	c := dial(t, p)
	roundTrip(t, c, 10)
	p.HalfOpen(Server)
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("server: %v, want ECONNRESET", err)
	}
	if _, err := c.Write([]byte("anyone?")); err != nil {
		t.Errorf("client: %v, want that it thinks the connection alive", err)
	}
	silent(t, c)
	roundTrip(t, dial(t, p), 10) // later connections are whole
	p.Reset()
	if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("client after a reset: %v, want an error", err)
	}
	<-ended

	c = dial(t, p)
	roundTrip(t, c, 10)
	p.HalfOpen(Client)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client: %v, want ECONNRESET", err)
	}
	select {
	case err := <-ended:
		t.Errorf("the server's side ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
}

func TestRefuse(t *testing.T) {
	eachNetwork(t, func(t *testing.T, target Addr) {
		p := proxy(t, target, Link{})
		c := dial(t, p)
		roundTrip(t, c, 10)
		for range 2 {
			if err := p.Refuse(true); err != nil {
				t.Fatal(err)
			}
			if nc, err := net.Dial(p.Addr().Network(), p.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
				if err == nil {
					nc.Close()
				}
				t.Errorf("dial: %v, want ECONNREFUSED", err)
			}
			roundTrip(t, c, 10)
			if err := p.Refuse(false); err != nil {
				t.Fatal(err)
			}
			roundTrip(t, dial(t, p), 10)
		}
	})
}

func TestUnreachableTarget(t *testing.T) {
	p := proxy(t, UNIX("/nonexistent/socket"), Link{})
	c := dial(t, p)
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || isTimeout(err) {
		t.Errorf("read %d, %v; want the connection to break", n, err)
	}
}

func TestBackPressure(t *testing.T) {
	release := make(chan struct{})
	target := server(t, TCP("127.0.0.1:0"), func(c net.Conn) {
		<-release
		io.Copy(io.Discard, c)
	})
	t.Cleanup(sync.OnceFunc(func() { close(release) }))
	p := proxy(t, target, Link{Buffer: 8 << 20})
	c := dial(t, p)
	c.SetWriteDeadline(time.Now().Add(time.Second))
	n, err := io.Copy(struct{ io.Writer }{c}, zeroes{})
	if !isTimeout(err) {
		t.Errorf("write: %v, want it to block", err)
	}
	// The kernel's own buffers on both sides come on top.
	if n > 64<<20 {
		t.Errorf("%d bytes were taken for a receiver that sleeps", n)
	}
	p.toServer.mu.Lock()
	used := p.toServer.used
	p.toServer.mu.Unlock()
	if limit := int64(8<<20/connShare + blockSize); used > limit {
		t.Errorf("%d bytes are buffered, more than %d", used, limit)
	}
}

func TestCloseUnderLoad(t *testing.T) {
	target := server(t, TCP("127.0.0.1:0"), echo)
	for _, link := range []Link{{}, {RTT: 20 * time.Millisecond}, {Bandwidth: 1 << 20}, {RTT: time.Hour}} {
		ctx, cancel := context.WithCancel(context.Background())
		p, err := Listen(ctx, TCP("127.0.0.1:0"), target, link)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 8 {
			c := dial(t, p)
			wg.Go(func() { io.Copy(struct{ io.Writer }{c}, zeroes{}) })
			wg.Go(func() { io.Copy(io.Discard, c) })
		}
		time.Sleep(20 * time.Millisecond)
		if link.RTT == 0 {
			cancel()
		}
		var closers sync.WaitGroup
		for range 3 {
			closers.Go(func() {
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		closers.Wait()
		wg.Wait()
		cancel()
		if p.Conns() != 0 {
			t.Errorf("%d connections after Close", p.Conns())
		}
		if err := p.Refuse(true); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Refuse after Close: %v", err)
		}
	}
}

func TestFaultsAtRandom(t *testing.T) {
	rnd := testenv.Rand(t)
	target := server(t, TCP("127.0.0.1:0"), echo)
	p := proxy(t, target, Link{RTT: time.Millisecond})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := net.Dial("tcp", p.Addr().String())
				if err != nil {
					time.Sleep(time.Millisecond)
					continue
				}
				c.SetDeadline(time.Now().Add(30 * time.Millisecond))
				go io.Copy(c, io.LimitReader(zeroes{}, 1<<20))
				io.Copy(io.Discard, c)
				c.Close()
			}
		})
	}
	for range 300 {
		switch rnd.IntN(6) {
		case 0:
			p.Reset()
		case 1:
			p.HalfOpen(Side(rnd.IntN(2)))
		case 2:
			p.Blackhole(rnd.IntN(2) == 0)
		case 3:
			if err := p.Refuse(rnd.IntN(2) == 0); err != nil {
				t.Fatal(err)
			}
		case 4:
			p.SetLink(Link{RTT: time.Duration(rnd.IntN(5)) * time.Millisecond, Bandwidth: int64(rnd.IntN(2)) << 24})
		}
		time.Sleep(2 * time.Millisecond)
	}
	p.Blackhole(false)
	if err := p.Refuse(false); err != nil {
		t.Fatal(err)
	}
	if err := p.SetLink(Link{}); err != nil {
		t.Fatal(err)
	}
	close(stop)
	wg.Wait()
	p.Reset()
	roundTrip(t, dial(t, p), 1<<20)
}
