package netsim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// hang is how long anything may take before it counts as hung.
const hang = 20 * time.Second

// server accepts connections and passes each to handle, until the test ends.
func server(t testing.TB, listen Addr, handle func(net.Conn)) Addr {
	t.Helper()
	l, err := net.Listen(listen.Network, listen.Address)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	conns := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[c] = true
			mu.Unlock()
			wg.Go(func() { handle(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return Addr{listen.Network, l.Addr().String()}
}

func echo(c net.Conn) {
	defer c.Close()
	io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
}

// proxy starts one for the test, on the same kind of socket as its target.
func proxy(t testing.TB, target Addr, link Link) *Proxy {
	t.Helper()
	listen := TCP("127.0.0.1:0")
	if target.Network == "unix" {
		listen = UNIX(testenv.TempSocket(t))
	}
	p, err := Listen(context.Background(), listen, target, link)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if p.Conns() != 0 {
			t.Errorf("%d connections after Close", p.Conns())
		}
		for _, d := range []*direction{&p.toServer, &p.toClient} {
			if d.used != 0 {
				t.Errorf("%d bytes are still accounted for after Close", d.used)
			}
		}
	})
	return p
}

func dial(t testing.TB, p *Proxy) net.Conn {
	t.Helper()
	c, err := net.Dial(p.Addr().Network(), p.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(hang))
	return c
}

// roundTrip sends n bytes to an echo server and returns how long the answer
// took.
func roundTrip(t testing.TB, c net.Conn, n int) time.Duration {
	t.Helper()
	p, q := make([]byte, n), make([]byte, n)
	for i := range p {
		p[i] = byte(rand.Int())
	}
	start := time.Now()
	if _, err := c.Write(p); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, q); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	if !bytes.Equal(p, q) {
		t.Fatal("the echo differs from what was sent")
	}
	return took
}

// silent fails the test if a byte or an error arrives on c.
func silent(t testing.TB, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	n, err := c.Read(make([]byte, 1))
	if !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
		t.Fatalf("read %d bytes, error %v; want silence", n, err)
	}
	c.SetReadDeadline(time.Now().Add(hang))
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

var networks = map[string]func(testing.TB) Addr{
	"tcp":  func(testing.TB) Addr { return TCP("127.0.0.1:0") },
	"unix": func(t testing.TB) Addr { return UNIX(testenv.TempSocket(t)) },
}

func eachNetwork(t *testing.T, f func(t *testing.T, target Addr)) {
	for name, addr := range networks {
		t.Run(name, func(t *testing.T) { f(t, server(t, addr(t), echo)) })
	}
}

func TestDelayIsNeverLessThanRTT(t *testing.T) {
	eachNetwork(t, func(t *testing.T, target Addr) {
		for _, rtt := range []time.Duration{0, time.Millisecond, 20 * time.Millisecond} {
			p := proxy(t, target, Link{RTT: rtt})
			c := dial(t, p)
			best := hang
			for range 20 {
				took := roundTrip(t, c, 100)
				if took < rtt {
					t.Errorf("RTT %v: an answer came after %v", rtt, took)
				}
				best = min(best, took)
			}
			t.Logf("RTT %v: best answer after %v", rtt, best)
			if best > rtt+5*time.Millisecond {
				t.Errorf("RTT %v: no answer of 20 came before %v", rtt, best)
			}
		}
	})
}

func TestTargetIsDialedAfterHalfARoundTrip(t *testing.T) {
	const rtt = 100 * time.Millisecond
	start := time.Now()
	accepted := make(chan time.Duration, 1)
	target := server(t, TCP("127.0.0.1:0"), func(c net.Conn) {
		accepted <- time.Since(start)
		c.Write([]byte("hello"))
		c.Close()
	})
	c := dial(t, proxy(t, target, Link{RTT: rtt}))
	hello, err := io.ReadAll(c)
	if err != nil || string(hello) != "hello" {
		t.Fatalf("read %q, %v", hello, err)
	}
	if took := time.Since(start); took < rtt {
		t.Errorf("the greeting came after %v, before one round trip", took)
	}
	if took := <-accepted; took < rtt/2 {
		t.Errorf("the target was reached after %v, before half a round trip", took)
	}
}

// A delay must not cost throughput: this would take 64 round trips of 200 ms
// if pieces waited for one another.
func TestDelayIsPipelined(t *testing.T) {
	target := server(t, TCP("127.0.0.1:0"), echo)
	c := dial(t, proxy(t, target, Link{RTT: 200 * time.Millisecond}))
	const n = 64
	go func() {
		for i := range n {
			c.Write(bytes.Repeat([]byte{byte(i)}, 1000))
			time.Sleep(time.Millisecond)
		}
	}()
	start := time.Now()
	got := make([]byte, n*1000)
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("%d pieces took %v: they wait for one another", n, took)
	}
	for i, b := range got {
		if b != byte(i/1000) {
			t.Fatalf("byte %d is %d, want %d", i, b, i/1000)
		}
	}
}

func TestBytesArriveInOrderAndWhole(t *testing.T) {
	seed := testenv.Seed(t)
	eachNetwork(t, func(t *testing.T, target Addr) {
		p := proxy(t, target, Link{RTT: time.Millisecond, Jitter: 3 * time.Millisecond})
		var wg sync.WaitGroup
		for i := range 4 {
			c := dial(t, p)
			wg.Go(func() { checkStream(t, c, uint64(seed)+uint64(i), 8<<20) })
		}
		wg.Wait()
	})
}

// checkStream sends n pseudo-random bytes through an echo server, ends the
// stream, and compares what comes back up to its end.
func checkStream(t *testing.T, c net.Conn, seed uint64, n int) {
	src := rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), seed)))
	want := make([]byte, n)
	src.Read(want)
	go func() {
		r := rand.New(rand.NewPCG(seed, 1))
		for p := want; len(p) > 0; {
			k := min(len(p), 1+r.IntN(100_000))
			if _, err := c.Write(p[:k]); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			p = p[k:]
		}
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %d bytes back of %d, equal %t, error %v", len(got), n, bytes.Equal(got, want), err)
	}
}

func TestBandwidthIsSharedByAllConnections(t *testing.T) {
	const rate, n = 8 << 20, 2 << 20
	target := server(t, TCP("127.0.0.1:0"), func(c net.Conn) {
		defer c.Close()
		c.Write(make([]byte, n))
	})
	p := proxy(t, target, Link{Bandwidth: rate})
	start := time.Now()
	var wg sync.WaitGroup
	for range 2 {
		c := dial(t, p)
		wg.Go(func() {
			if got, err := io.Copy(io.Discard, c); err != nil || got != n {
				t.Errorf("%d bytes, %v", got, err)
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	least := 2 * n * time.Second / rate
	if took < least || took > 4*least {
		t.Errorf("%d bytes at %d B/s took %v, want %v or somewhat more", 2*n, rate, took, least)
	}
	if _, down := p.Bytes(); down != 2*n {
		t.Errorf("%d bytes are counted, want %d", down, 2*n)
	}
}

// The queue in front of a slow link is short, as seen by a second connection.
func TestSlowLinkIsNotBloated(t *testing.T) {
	target := server(t, TCP("127.0.0.1:0"), echo)
	p := proxy(t, target, Link{Bandwidth: 4 << 20})
	bulk := dial(t, p)
	go io.Copy(bulk, struct{ io.Reader }{zeroes{}})
	go io.Copy(io.Discard, bulk)
	c := dial(t, p)
	best := hang
	for range 5 {
		best = min(best, roundTrip(t, c, 64))
	}
	if best > time.Second {
		t.Errorf("beside a bulk transfer an answer takes %v", best)
	}
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { return len(p), nil }

func TestSetLink(t *testing.T) {
	target := server(t, TCP("127.0.0.1:0"), echo)
	p := proxy(t, target, Link{})
	c := dial(t, p)
	roundTrip(t, c, 10)
	if err := p.SetLink(Link{RTT: 50 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if took := roundTrip(t, c, 10); took < 50*time.Millisecond {
		t.Errorf("an answer after %v through the slower link", took)
	}
	// A sender that waits for a link of one byte per second must notice that
	// it became fast.
	if err := p.SetLink(Link{Bandwidth: 1}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 8 {
			c.Write(make([]byte, minPiece))
			time.Sleep(time.Millisecond)
		}
	}()
	<-done
	time.Sleep(20 * time.Millisecond)
	if err := p.SetLink(Link{RTT: -1}); err == nil {
		t.Error("a negative RTT was accepted")
	}
	if err := p.SetLink(Link{}); err != nil {
		t.Fatal(err)
	}
	fresh := dial(t, p)
	roundTrip(t, fresh, 1<<20)
}

func BenchmarkThroughput(b *testing.B) {
	for _, network := range []string{"tcp", "unix"} {
		for _, rtt := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond} {
			b.Run(network+"/"+rtt.String(), func(b *testing.B) {
				const n = 256 << 20
				target := server(b, networks[network](b), func(c net.Conn) {
					defer c.Close()
					p := make([]byte, 256<<10)
					for sent := 0; sent < n; sent += len(p) {
						if _, err := c.Write(p); err != nil {
							return
						}
					}
				})
				p := proxy(b, target, Link{RTT: rtt})
				buf := make([]byte, 256<<10)
				b.SetBytes(n)
				for b.Loop() {
					c := dial(b, p)
					got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, buf)
					if err != nil || got != n {
						b.Fatal(got, err)
					}
					c.Close()
				}
			})
		}
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	for _, rtt := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond} {
		b.Run(rtt.String(), func(b *testing.B) {
			p := proxy(b, server(b, TCP("127.0.0.1:0"), echo), Link{RTT: rtt})
			c := dial(b, p)
			buf := make([]byte, 32)
			var extra time.Duration
			for b.Loop() {
				start := time.Now()
				c.Write(buf)
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
				extra += time.Since(start) - rtt
			}
			b.ReportMetric(float64(extra.Microseconds())/float64(b.N), "us-beyond-RTT/op")
		})
	}
}
