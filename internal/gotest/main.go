// Command gotest runs "go test" with the arguments it is given and prints what
// a person reads: one line per package as usual, everything of a test that
// failed, and at the end each skipped test with its reason, which plain
// "go test" hides and "go test -v" buries.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit status of go test.
func run(args []string, stdout, stderr io.Writer) int {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(stderr, "gotest:", err)
		return 1
	}
	p := newPrinter(stdout)
	p.read(out)
	err = cmd.Wait()
	p.summary()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1)
	case err != nil:
		fmt.Fprintln(stderr, "gotest:", err)
		return 1
	}
	return 0
}

// event is a line of test2json; see "go doc test2json".
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
}

type testKey struct{ pkg, test string }

// printer keeps the output of each test until its result is known.
type printer struct {
	w       io.Writer
	pending map[testKey][]string
	skipped []string
	passed  int
	failed  int
}

func newPrinter(w io.Writer) *printer {
	return &printer{w: w, pending: make(map[testKey][]string)}
}

// maxLine bounds a line of JSON; test2json splits longer output.
const maxLine = 4 << 20

func (p *printer) read(r io.Reader) {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	for s.Scan() {
		var e event
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			fmt.Fprintln(p.w, s.Text()) // not JSON: the go command itself speaks
			continue
		}
		p.event(e)
	}
	if err := s.Err(); err != nil {
		fmt.Fprintln(p.w, "gotest: reading go test's output:", err)
		_, _ = io.Copy(io.Discard, r) // let go test end
	}
}

func (p *printer) event(e event) {
	key := testKey{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(p.w, e.Output)
	case "output":
		switch {
		case e.Test != "":
			p.pending[key] = append(p.pending[key], e.Output)
		case e.Output == "PASS\n": // the line with "ok" says so
		default:
			fmt.Fprint(p.w, e.Output)
		}
	case "pass":
		if e.Test != "" {
			p.passed++
		}
		delete(p.pending, key)
	case "skip":
		if e.Test != "" {
			p.skipped = append(p.skipped, fmt.Sprintf("%s %s: %s", shorten(e.Package), e.Test, reason(p.pending[key])))
		}
		delete(p.pending, key)
	case "fail":
		if e.Test == "" {
			p.flush(e.Package)
			return
		}
		p.failed++
		p.print(key)
	}
}

// flush prints what tests said that never ended: a panic or the deadline.
func (p *printer) flush(pkg string) {
	var keys []testKey
	for k := range p.pending {
		if k.pkg == pkg {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, b testKey) int { return strings.Compare(a.test, b.test) })
	for _, k := range keys {
		p.print(k)
	}
}

func (p *printer) print(k testKey) {
	for _, line := range p.pending[k] {
		if !strings.HasPrefix(line, "=== ") {
			fmt.Fprint(p.w, line)
		}
	}
	delete(p.pending, k)
}

func (p *printer) summary() {
	if len(p.skipped) > 0 {
		fmt.Fprintln(p.w, "\nskipped:")
		for _, s := range p.skipped {
			fmt.Fprintln(p.w, "  "+s)
		}
	}
	fmt.Fprintf(p.w, "\n%d passed, %d failed, %d skipped\n", p.passed, p.failed, len(p.skipped))
}

// reason returns what a test said when it skipped.
func reason(output []string) string {
	var said []string
	for _, line := range output {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ") {
			continue
		}
		// "file_test.go:12: why" becomes "why".
		if _, after, ok := strings.Cut(line, ".go:"); ok {
			if _, why, ok := strings.Cut(after, ": "); ok {
				line = why
			}
		}
		said = append(said, line)
	}
	if len(said) == 0 {
		return "no reason given"
	}
	return strings.Join(said, " ")
}

// shorten names a package of this module as the command line does.
func shorten(pkg string) string {
	const module = "github.com/memferry/memferry"
	if rest, ok := strings.CutPrefix(pkg, module); ok {
		return "." + rest
	}
	return pkg
}
