package lint

import (
	"strings"
	"testing"
)

// generic are the internal packages that serve everyone and know nobody but
// the root and each other.
func generic(dir string) bool {
	return strings.HasPrefix(dir, "./internal/") &&
		!within(dir[2:], "internal/cli/...", "internal/bench/...", "internal/lint/...", "internal/gotest/...", "internal/vm/...")
}

// top are the packages that may import everything: the command, and what
// drives the whole from outside.
var top = []string{"cmd/...", "examples/...", "internal/cli/...", "internal/bench/...", "internal/vm/...", "integration/..."}

// exceptions are imports beyond the rule, by importing directory.
var exceptions = map[string][]string{
	"backend/all":     {"./backend/...", "./nbd"},
	"backend/dir":     {"./backend/chunked"},
	"frontend/fuse":   {"./frontend"},
	"internal/vm/cmd": {"./internal/vm"},
	// It needs a region to pull into the memory, whatever the source is.
	"frontend/uffd": {"./region"},
	// The data of a cache is a file, and a backend at once.
	"internal/cache": {"./backend/file"},
}

// TestImports: a package imports the root and generic internal packages; never
// its neighbours, and never what stands left of it in docs/design.md.
func TestImports(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || within(s.dir, top...) {
			continue
		}
		for _, i := range s.imports() {
			if i != "." && !strings.HasPrefix(i, "./") {
				continue
			}
			var patterns []string
			for _, e := range exceptions[s.dir] {
				patterns = append(patterns, strings.TrimPrefix(e, "./"))
			}
			if i == "." || generic(i) || within(strings.TrimPrefix(i, "./"), patterns...) {
				continue
			}
			t.Errorf("%s imports %s: it may import the root and generic internal packages only", s.path, i)
		}
	}
}

// TestNobodyImportsTheTop: the command, the benchmarks and the test helpers
// are ends of the graph.
func TestNobodyImportsTheTop(t *testing.T) {
	for _, s := range sources(t) {
		for _, i := range s.imports() {
			dir, ours := strings.CutPrefix(i, "./")
			if !ours {
				continue
			}
			switch {
			case within(dir, "cmd/...", "integration/...", "internal/lint/...", "internal/gotest/..."):
				t.Errorf("%s imports %s", s.path, i)
			case within(dir, "internal/cli/...") && !s.test && !within(s.dir, "cmd/...", "internal/cli/..."):
				t.Errorf("%s imports %s: only the command does", s.path, i)
			case dir == "internal/testenv" && !s.test && !within(s.dir, testSupport...):
				t.Errorf("%s imports %s outside a test", s.path, i)
			}
		}
	}
}

// testSupport are packages that exist for tests, whatever their files' names.
var testSupport = []string{"backend/backendtest", "internal/testenv", "integration/..."}

// owners says which packages may import a module, so that a dependency stays
// behind one package. Modules that are not here are std or a mistake.
var owners = map[string][]string{
	"github.com/spf13/cobra":              {"internal/cli/...", "cmd/..."},
	"github.com/spf13/pflag":              {"internal/cli/..."},
	"github.com/vbauerster/mpb/v8":        {"internal/cli/..."},
	"github.com/prometheus/client_golang": {"internal/cli/...", "internal/metrics"},
	"github.com/hanwen/go-fuse/v2":        {"frontend/fuse/..."},
	"github.com/cespare/xxhash/v2":        {"internal/cache", "internal/cli/...", "backend/dir"},
	"golang.org/x/sync":                   {"./..."},
	"golang.org/x/sys":                    {"./..."},
	"golang.org/x/time":                   {"./..."},
	"github.com/google/go-cmp":            testSupport,
	"go.uber.org/goleak":                  testSupport,
	"pgregory.net/rapid":                  testSupport,
	"github.com/rogpeppe/go-internal":     {},
	"golang.org/x/term":                   {"internal/cli/..."},
}

// TestModules: the root package needs nothing but the standard library, and
// every other dependency has an owner. Tests may import what go.mod has.
func TestModules(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, i := range s.imports() {
			if i == "C" {
				t.Errorf("%s uses cgo", s.path)
			}
			first, _, _ := strings.Cut(i, "/")
			if !strings.Contains(first, ".") || i == "." || strings.HasPrefix(i, "./") {
				continue
			}
			if s.dir == "." {
				t.Errorf("%s imports %s: the root package needs the standard library alone", s.path, i)
			}
			allowed, known := owner(i)
			switch {
			case !known:
				t.Errorf("%s imports %s, which has no owner in internal/lint", s.path, i)
			case !within(s.dir, allowed...) && !contains(allowed, "./..."):
				t.Errorf("%s imports %s, which belongs to %v", s.path, i, allowed)
			}
		}
	}
}

func owner(pkg string) (dirs []string, ok bool) {
	for m, dirs := range owners {
		if pkg == m || strings.HasPrefix(pkg, m+"/") {
			return dirs, true
		}
	}
	return nil, false
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}
