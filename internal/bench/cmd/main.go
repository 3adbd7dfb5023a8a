// Command cmd runs the benchmarks; see docs/benchmarks.md.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/memferry/memferry/internal/bench"
)

// group is a set of scenarios that share servers.
type group struct {
	name string
	run  func(context.Context, *bench.Env) error
}

var groups = []group{
	{"nbd", bench.NBD},
	{"fuse", bench.FUSE},
	{"link", bench.Link},
	{"direct", bench.Direct},
	{"memory", bench.Memory},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	which := flag.String("run", "all", "groups to run, separated by commas: nbd, fuse, link, direct, memory")
	quick := flag.Bool("quick", false, "small sizes and one round: shows that it works, not how fast it is")
	rounds := flag.Int("rounds", 5, "measurements of each subject")
	size := flag.Int64("size", 1<<30, "bytes that the sequential scenarios move")
	seconds := flag.Int("seconds", 3, "length of the timed scenarios")
	jsonFile := flag.String("json", "", "also write the raw results to this file, one JSON object a line")
	flag.Parse()
	o := bench.Options{Rounds: *rounds, Size: *size, Seconds: *seconds, Log: os.Stderr}
	if *quick {
		o.Rounds, o.Size, o.Seconds = 1, 64<<20, 1
	}
	selected := strings.Split(*which, ",")
	for _, s := range selected {
		if s != "all" && !slices.ContainsFunc(groups, func(g group) bool { return g.name == s }) {
			return fmt.Errorf("no group %q: there are nbd, fuse, link, direct, memory", s)
		}
	}
	for _, program := range []string{"nbdcopy", "nbdkit", "nbdfuse", "qemu-nbd", "fio"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%s is missing: run scripts/install-test-deps", program)
		}
	}
	e, err := bench.Open(ctx, o)
	if err != nil {
		return err
	}
	for _, g := range groups {
		if slices.Contains(selected, "all") || slices.Contains(selected, g.name) {
			if gerr := g.run(ctx, e); gerr != nil {
				err = errors.Join(err, fmt.Errorf("%s: %w", g.name, gerr))
			}
		}
	}
	e.Report.WriteTables(os.Stdout, e.Report.Judge(bench.Goals()))
	if *jsonFile != "" {
		var b bytes.Buffer
		err = errors.Join(err, e.Report.WriteJSON(&b), os.WriteFile(*jsonFile, b.Bytes(), 0o644))
	}
	return errors.Join(err, e.Close())
}
