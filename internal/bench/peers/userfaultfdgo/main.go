// Command userfaultfdgo uses memory mapped by loopholelabs/userfaultfd-go, and
// prints what it measured as JSON, for the benchmarks alone. It is a module of
// its own so that the product does not depend on what it is compared with. It
// needs cgo.
//
// Its source is the best there could be: memory of this process, and for a far
// one a wait of exactly a round trip. Run it with GODEBUG=asyncpreemptoff=1, since a
// signal that interrupts a fault ends the handler, and GOGC=off, since a garbage
// collection waits for a fault whose handler waits for the collection.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand"
	"os"
	"sort"
	"time"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"
)

const pageSize = 4096

// value is one measurement, as the benchmarks take it.
type value struct {
	Metric, Unit, Better string
	X                    float64
}

// late is a source behind a round trip.
type late struct {
	io.ReaderAt
	rtt time.Duration
}

func (l late) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(l.rtt)
	return l.ReaderAt.ReadAt(p, off)
}

func main() {
	file := flag.String("file", "", "what the memory holds")
	size := flag.Int("size", 0, "bytes to touch in order; 0: all")
	rtt := flag.Duration("rtt", 0, "how long the source takes to answer")
	apart := flag.Int("random", 0, "touch one page of each so many bytes in random order instead")
	flag.Parse()
	values, err := run(*file, *size, *rtt, *apart)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(values)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "userfaultfdgo:", err)
		os.Exit(1)
	}
}

func run(file string, size int, rtt time.Duration, apart int) ([]value, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	m, fd, start, err := mapper.Register(len(content))
	if err != nil {
		return nil, err
	}
	var source io.ReaderAt = bytes.NewReader(content)
	if rtt > 0 {
		source = late{source, rtt}
	}
	if size == 0 {
		size = len(m)
	}
	failed, done := make(chan error, 1), make(chan []value, 1)
	go func() { failed <- mapper.Handle(fd, start, source) }()
	go func() {
		if apart > 0 {
			done <- random(m, apart)
			return
		}
		done <- inOrder(m[:size])
	}()
	select {
	case v := <-done:
		return v, nil
	case err := <-failed: // the pages that are missing then never arrive
		return nil, fmt.Errorf("the handler ended: %w", err)
	}
}

var sink byte

func inOrder(m []byte) []value {
	var sum byte
	begin := time.Now()
	for i := 0; i < len(m); i += pageSize {
		sum ^= m[i]
	}
	took := time.Since(begin)
	sink = sum
	return []value{{"rate", "MB/s", "higher", float64(len(m)) / 1e6 / took.Seconds()}}
}

func random(m []byte, apart int) []value {
	var took []float64
	for _, i := range rand.Perm(len(m) / apart) {
		off := i*apart + rand.Intn(apart/pageSize)*pageSize
		begin := time.Now()
		sink = m[off]
		took = append(took, float64(time.Since(begin).Nanoseconds())/1e3)
	}
	sort.Float64s(took)
	return []value{
		{"p50", "us", "lower", took[len(took)/2]},
		{"p99", "us", "lower", took[len(took)*99/100]},
	}
}
