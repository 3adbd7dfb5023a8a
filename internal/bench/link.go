package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/memferry/memferry/internal/netsim"
)

// linkRTTs are the round trips behind which everything is compared.
var linkRTTs = []time.Duration{time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond}

// linkSize bounds what the link scenarios move.
const linkSize = 512 << 20

// farServer is a server behind a link.
type farServer struct {
	near, far endpoint
	p         *process
	link      *netsim.Proxy
}

// uri names the export as seen from the far side.
func (s *farServer) uri(export string) string { return s.far.uri(export) }

func (s *farServer) stop() {
	_ = s.link.Close() // its connections end here either way
	s.p.stop()
}

// behind serves a file, as the export d, behind a link.
func (e *Env) behind(ctx context.Context, link netsim.Link, path string) (*farServer, error) {
	return e.far(ctx, link, func(at endpoint) (*process, error) {
		return serverAt(at, e.memferry, "serve", "--listen", listenURL(at), "d="+path)
	})
}

// far starts a server behind a link.
func (e *Env) far(ctx context.Context, link netsim.Link, serve func(at endpoint) (*process, error)) (*farServer, error) {
	near, err := e.endpoint("unix")
	if err != nil {
		return nil, err
	}
	far, err := e.endpoint("unix")
	if err != nil {
		return nil, err
	}
	p, err := serve(near)
	if err != nil {
		return nil, err
	}
	l, err := netsim.Listen(ctx, netsim.UNIX(far.addr), netsim.UNIX(near.addr), link)
	if err != nil {
		p.stop()
		return nil, err
	}
	return &farServer{near, far, p, l}, nil
}

// Link compares what happens behind a delay.
func Link(ctx context.Context, e *Env) error {
	for _, rtt := range linkRTTs {
		if err := e.linkAt(ctx, rtt); err != nil {
			return err
		}
	}
	return nil
}

func (e *Env) linkAt(ctx context.Context, rtt time.Duration) error {
	at := fmt.Sprintf(" at %v", rtt)
	if !e.wants("cat"+at, "first byte"+at, "4K during the pull"+at, "push"+at) {
		return nil
	}
	size := min(e.Size, linkSize)
	source := filepath.Join(e.dir, "far")
	if err := e.truncatedCopy(source, size); err != nil {
		return err
	}
	link := netsim.Link{RTT: rtt}
	ours, err := e.behind(ctx, link, source)
	if err != nil {
		return err
	}
	defer ours.stop()
	kit, err := e.far(ctx, link, func(at endpoint) (*process, error) { return nbdkit(at, "file", source) })
	if err != nil {
		return err
	}
	defer kit.stop()
	copyURI := []string{"--connections=4", "--requests=64"}

	// One request at a time takes a round trip each: nbdfuse reads as much as a
	// few seconds allow, which tells its rate as well.
	fuseBytes := min(size, max(4<<20, int64(3*time.Second/rtt)*128<<10))

	e.Compare(ctx, "link", "cat"+at,
		Subject{"memferry", func(ctx context.Context) ([]Value, error) { return e.freshCat(ctx, ours.uri("d"), size) }},
		Subject{"nbdcopy 4x64", func(ctx context.Context) ([]Value, error) {
			took, _, err := run(ctx, "nbdcopy", append(copyURI, kit.uri(""), "null:")...)
			return []Value{rate("rate", size, took)}, err
		}},
		Subject{"nbdfuse", func(ctx context.Context) ([]Value, error) { return e.nbdfuseCat(ctx, kit.uri(""), fuseBytes) }},
	)
	e.Compare(ctx, "link", "first byte"+at,
		Subject{"memferry", func(ctx context.Context) ([]Value, error) { return e.firstByte(ctx, ours.uri("d"), size) }})
	e.Compare(ctx, "link", "4K during the pull"+at,
		Subject{"memferry", func(ctx context.Context) ([]Value, error) { return e.during(ctx, ours.uri("d"), size) }})
	e.Compare(ctx, "link", "push"+at,
		Subject{"memferry", func(ctx context.Context) ([]Value, error) { return e.push(ctx, ours.uri("d"), size, source) }},
		Subject{"nbdcopy 4x64", func(ctx context.Context) ([]Value, error) {
			took, _, err := run(ctx, "nbdcopy", append(append([]string{"--flush"}, copyURI...), source, kit.uri(""))...)
			return []Value{rate("rate", size, took)}, err
		}})
	return ctx.Err()
}

// truncatedCopy makes a file of the first n bytes of the data.
func (e *Env) truncatedCopy(path string, n int64) error {
	if _, err := e.copyData(filepath.Base(path)); err != nil {
		return err
	}
	return os.Truncate(path, n)
}

// freshCat mounts and reads everything: its rate from the open on, and from the
// start of the mount command on.
func (e *Env) freshCat(ctx context.Context, uri string, size int64) ([]Value, error) {
	begin := time.Now()
	m, err := e.mount(ctx, uri, "--io-timeout=2m")
	if err != nil {
		return nil, err
	}
	took, _, err := cat(m.path, size)
	all := time.Since(begin)
	return []Value{rate("rate", size, took), rate("rate with mounting", size, all)}, errors.Join(err, m.umount())
}

func (e *Env) nbdfuseCat(ctx context.Context, uri string, n int64) ([]Value, error) {
	m, err := e.nbdfuse(ctx, uri)
	if err != nil {
		return nil, err
	}
	took, _, err := cat(m.path, n)
	return []Value{rate("rate", n, took)}, errors.Join(err, m.umount())
}

// firstByte opens a fresh mount and reads 4 KiB somewhere.
func (e *Env) firstByte(ctx context.Context, uri string, size int64) ([]Value, error) {
	m, err := e.mount(ctx, uri, "--io-timeout=2m")
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	err = readOnce(m.path, size/2+rand.Int64N(size/8192)*4096)
	took := time.Since(begin)
	return []Value{milliseconds("latency", took)}, errors.Join(err, m.umount())
}

func readOnce(path string, off int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.ReadAt(make([]byte, 4096), off)
	return err
}

func milliseconds(metric string, d time.Duration) Value {
	return Value{metric, "ms", Lower, float64(d.Nanoseconds()) / 1e6}
}

const (
	// duringReaders is how many threads read at random during the pull.
	duringReaders = 4
	// duringTime bounds how long they do.
	duringTime = 3 * time.Second
)

// during reads and writes pages at random while the pull runs, from the moment
// the mount is there until all is local, and returns high percentiles. Reads
// of what is local already are part of it: so the application sees it. The
// slowest of the first reads, which are not, are told apart by the p99.
func (e *Env) during(ctx context.Context, uri string, size int64) ([]Value, error) {
	m, err := e.mount(ctx, uri, "--io-timeout=2m")
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(m.path, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(err, m.umount())
	}
	var (
		mu            sync.Mutex
		reads, writes []float64
		failed        error
		wg            sync.WaitGroup
	)
	end := time.Now().Add(duringTime)
	for range duringReaders {
		wg.Go(func() {
			r, w, err := randomAccess(f, size, end)
			mu.Lock()
			defer mu.Unlock()
			reads, writes = append(reads, r...), append(writes, w...)
			failed = errors.Join(failed, err)
		})
	}
	wg.Wait()
	values := []Value{
		{"read p50", "ms", Lower, Percentile(reads, 50)},
		{"read p99", "ms", Lower, Percentile(reads, 99)},
		{"write p50", "ms", Lower, Percentile(writes, 50)},
		{"write p99", "ms", Lower, Percentile(writes, 99)},
		{"reads", "count", Higher, float64(len(reads))},
	}
	return values, errors.Join(failed, f.Close(), m.umount())
}

// slowEnough is the latency, in ms, below which a read did not leave this host.
const slowEnough = 0.5

// randomAccess reads a page and writes another, over and over, until end or
// until a run of reads shows that everything is local.
func randomAccess(f *os.File, size int64, end time.Time) (reads, writes []float64, err error) {
	p := make([]byte, 4096)
	for local := 0; local < 200 && time.Now().Before(end); {
		begin := time.Now()
		if _, err := f.ReadAt(p, rand.Int64N(size/4096)*4096); err != nil {
			return reads, writes, err
		}
		read := float64(time.Since(begin).Nanoseconds()) / 1e6
		reads = append(reads, read)
		local++
		if read > slowEnough {
			local = 0
		}
		begin = time.Now()
		if _, err := f.WriteAt(p, rand.Int64N(size/4096)*4096); err != nil {
			return reads, writes, err
		}
		writes = append(writes, float64(time.Since(begin).Nanoseconds())/1e6)
	}
	return reads, writes, nil
}

// push writes everything to a mount that holds it back, and unmounts it: the
// time from then on until all of it is synced at the server. The time from the
// first write on is told beside it.
func (e *Env) push(ctx context.Context, uri string, size int64, source string) ([]Value, error) {
	m, err := e.mount(ctx, uri, "--pull=none", "--io-timeout=2m", "--push-interval=-1s", "--push-idle=-1s", "--push-backlog=1T")
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	_, _, err = run(ctx, "dd", "if="+source, "of="+m.path, "bs=1M", "conv=notrunc", "status=none", "count="+strconv.FormatInt(size>>20, 10))
	written := time.Now()
	err = errors.Join(err, m.umount())
	return []Value{
		rate("rate", size, time.Since(written)),
		rate("rate of the writes", size, written.Sub(begin)),
		rate("rate from the first write on", size, time.Since(begin)),
	}, err
}
