// Command userfaultfdgo touches memory mapped by loopholelabs/userfaultfd-go for
// the first time, page by page, and prints how fast that was in GiB/s: the
// figure beside those of BenchmarkFirstTouch in frontend/uffd. It is a module
// of its own so that the product does not depend on what it is compared with.
// It needs cgo.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"
)

func main() {
	size := flag.Int("size", 1<<30, "bytes")
	rounds := flag.Int("rounds", 5, "how many times")
	flag.Parse()
	content := bytes.Repeat([]byte("memferry"), *size/8)
	for range *rounds {
		if err := touch(content); err != nil {
			fmt.Fprintln(os.Stderr, "userfaultfdgo:", err)
			os.Exit(1)
		}
	}
}

func touch(content []byte) error {
	m, fd, start, err := mapper.Register(len(content))
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- mapper.Handle(fd, start, bytes.NewReader(content)) }()
	begin := time.Now()
	done := make(chan bool, 1)
	go func() {
		ok := true
		for i := 0; i < len(m); i += 4096 {
			ok = ok && m[i] == 'm'
		}
		done <- ok
	}()
	select {
	case ok := <-done:
		if !ok {
			return fmt.Errorf("wrong bytes")
		}
	case err := <-failed: // the pages that are missing then never arrive
		return err
	}
	fmt.Printf("%.3f GiB/s\n", float64(len(m))/(1<<30)/time.Since(begin).Seconds())
	return nil
}
