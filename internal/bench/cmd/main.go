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
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

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
	{"uffd", bench.UFFD},
}

func groupNames() string {
	var names []string
	for _, g := range groups {
		names = append(names, g.name)
	}
	return strings.Join(names, ", ")
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
	which := flag.String("run", "all", "groups to run, separated by commas: "+groupNames())
	only := flag.String("scenario", "", "run only scenarios whose name, as in the tables, this regular expression matches, such as 'cat at (1|10)ms$' or ' unix$'")
	quick := flag.Bool("quick", false, "small sizes and one round: shows that it works, not how fast it is")
	rounds := flag.Int("rounds", 5, "measurements of each subject")
	size := flag.Int64("size", 1<<30, "bytes that the sequential scenarios move")
	seconds := flag.Int("seconds", 2, "length of the timed scenarios")
	doc := flag.String("o", "", "also replace the sections of the groups that ran in this Markdown file")
	jsonFile := flag.String("json", "", "also write the raw results to this file, one JSON object a line")
	flag.Parse()
	o := bench.Options{Rounds: *rounds, Size: *size, Seconds: *seconds, Log: os.Stderr}
	if *quick {
		o.Rounds, o.Size, o.Seconds = 1, 64<<20, 1
	}
	if *doc != "" && o.Rounds < 5 {
		return fmt.Errorf("-o %s: a median of %d rounds is no figure to keep; run at least 5", *doc, o.Rounds)
	}
	var err error
	if o.Scenario, err = scenarios(*only, *doc); err != nil {
		return err
	}
	selected := strings.Split(*which, ",")
	for _, s := range selected {
		if s != "all" && !slices.ContainsFunc(groups, func(g group) bool { return g.name == s }) {
			return fmt.Errorf("no group %q: there are %s", s, groupNames())
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
			begin := time.Now()
			if gerr := g.run(ctx, e); gerr != nil {
				err = errors.Join(err, fmt.Errorf("%s: %w", g.name, gerr))
			}
			fmt.Fprintf(os.Stderr, "group %s took %v\n", g.name, time.Since(begin).Round(time.Second))
		}
	}
	if o.Scenario != nil && e.Report.Empty() && err == nil {
		err = fmt.Errorf("-scenario %q matches nothing in %s: there are %s", *only, *which, strings.Join(e.Skipped(), "; "))
	}
	e.Report.WriteTables(os.Stdout, bench.Goals())
	if *doc != "" && err == nil {
		err = errors.Join(writeDoc(*doc, e.Report, o), e.Sensitivity(ctx, filepath.Join(filepath.Dir(*doc), "bench")))
	}
	if *jsonFile != "" {
		var b bytes.Buffer
		err = errors.Join(err, e.Report.WriteJSON(&b), os.WriteFile(*jsonFile, b.Bytes(), 0o644))
	}
	return errors.Join(err, e.Close())
}

// scenarios compiles the expression that narrows a run; nil where there is none.
func scenarios(expression, doc string) (*regexp.Regexp, error) {
	if expression == "" {
		return nil, nil
	}
	if doc != "" {
		return nil, fmt.Errorf("-o %s: it replaces whole sections; leave out -scenario", doc)
	}
	re, err := regexp.Compile(expression)
	if err != nil {
		return nil, fmt.Errorf("-scenario: %w", err)
	}
	return re, nil
}

// writeDoc replaces the sections of the groups that ran in a document.
func writeDoc(path string, r *bench.Report, o bench.Options) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text := string(b)
	for _, group := range r.Groups() {
		var section strings.Builder
		fmt.Fprintf(&section, "%s\n\n", circumstances(o))
		r.WriteGroup(&section, group, bench.Goals())
		if text, err = bench.Splice(text, group, section.String()); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// circumstances says when and on what a section was measured.
func circumstances(o bench.Options) string {
	kernel := "unknown"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:])
	}
	return fmt.Sprintf("Measured on %s: %d processors, Linux %s, %s, %d MiB of data, medians of %d rounds.",
		time.Now().Format(time.DateOnly), runtime.NumCPU(), kernel, runtime.Version(), o.Size>>20, o.Rounds)
}
