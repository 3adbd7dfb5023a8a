// Command touch uses memory (package frontend/uffd) as an application would,
// and prints what it measured as JSON, for the benchmarks alone: a process of
// its own for every run, with nothing else in it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend"
	"github.com/memferry/memferry/backend/all"
	"github.com/memferry/memferry/frontend/uffd"
	"github.com/memferry/memferry/internal/bench"
	"github.com/memferry/memferry/region"
)

func open(ctx context.Context, url string) (memferry.Backend, error) {
	return all.Registry().Open(ctx, url, backend.Options{})
}

func main() {
	helped, err := uffd.Helper(open)
	if !helped {
		err = run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "touch:", err)
		os.Exit(1)
	}
}

// run measures what the first argument says.
func run() error {
	url := flag.String("url", "", "the source")
	pull := flag.String("pull", "full", "full, demand or none")
	small := flag.Bool("small", false, "without huge pages")
	here := flag.Bool("in-process", false, "without a helper")
	readOnly := flag.Bool("read-only", false, "map the memory without the right to write")
	part := flag.Float64("part", 0.01, "of the pages, for what writes some")
	flag.Parse()
	mode, err := region.ParsePullMode(*pull)
	if err != nil {
		return err
	}
	o := uffd.Options{Pull: mode, SmallPages: *small, ReadOnly: *readOnly}
	u := user{url: *url, o: o, here: *here}
	what := map[string]func() ([]bench.Value, error){
		"first-touch": u.firstTouch, "plain-write": u.plainWrite, "random": u.random,
		"first-byte": u.firstByte, "during": u.during, "writer": u.writer, "first-write": u.firstWrite,
		"detect": func() ([]bench.Value, error) { return u.detect(*part) },
	}[flag.Arg(0)]
	if what == nil {
		return fmt.Errorf("nothing to measure is called %q", flag.Arg(0))
	}
	values, err := what()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(values)
}

// user is an application.
type user struct {
	url  string
	o    uffd.Options
	here bool
}

// with opens the memory for as long as f runs.
func (u user) with(f func(m *uffd.Memory) ([]bench.Value, error)) ([]bench.Value, error) {
	m, err := u.open()
	if err != nil {
		return nil, err
	}
	values, err := f(m)
	return values, errors.Join(err, m.Close())
}

func (u user) open() (*uffd.Memory, error) {
	if !u.here {
		return uffd.OpenURL(context.Background(), u.url, u.o)
	}
	s, err := open(context.Background(), u.url)
	if err != nil {
		return nil, err
	}
	return uffd.Open(context.Background(), s, u.o)
}
