package lint

import (
	"go/ast"
	"strings"
	"testing"
)

// maxLines bounds a Go file, tests included: what is longer is two things.
const maxLines = 600

func TestFileLength(t *testing.T) {
	for _, s := range sources(t) {
		if s.lines > maxLines {
			t.Errorf("%s has %d lines; the limit is %d", s.path, s.lines, maxLines)
		}
	}
}

// mayPanic are the files whose panics are meant: a broken promise of our own
// code, never something that a peer, a file or a user can cause.
var mayPanic = map[string]string{
	"backend/backend.go": "a registry put together wrongly in the source",
}

func TestPanic(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || mayPanic[s.path] != "" || within(s.dir, testSupport...) {
			continue
		}
		s.calls(func(pkg, name string, call *ast.CallExpr) {
			if pkg == "" && name == "panic" {
				t.Errorf("%s panics: return an error, or give the reason in mayPanic of internal/lint", s.at(call))
			}
		})
	}
}

// speakers may write to the standard streams and end the process.
var speakers = []string{"cmd/...", "examples/...", "internal/cli/...", "internal/gotest", "internal/bench/...", "internal/vm/...", "integration/...", "internal/testenv"}

func TestPrintAndExit(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || within(s.dir, speakers...) {
			continue
		}
		s.calls(func(pkg, name string, call *ast.CallExpr) {
			switch {
			case pkg == "log" && name != "New":
				t.Errorf("%s calls log.%s: take a *slog.Logger in Options", s.at(call), name)
			case pkg == "fmt" && strings.HasPrefix(name, "Print"),
				pkg == "" && (name == "print" || name == "println"),
				pkg == "os" && name == "Exit":
				t.Errorf("%s calls %s.%s: only the command speaks and exits", s.at(call), pkg, name)
			case pkg == "slog" && (name == "Info" || name == "Warn" || name == "Error" || name == "Debug" || name == "Default" || name == "SetDefault"):
				t.Errorf("%s uses the default logger: take a *slog.Logger in Options", s.at(call))
			}
		})
	}
}

func TestPackageDocs(t *testing.T) {
	type pkg struct{ name, doc string }
	pkgs := map[string]pkg{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		p := pkgs[s.dir]
		p.name = s.file.Name.Name
		if s.file.Doc != nil {
			if p.doc != "" {
				t.Errorf("%s: package %s has two doc comments", s.path, p.name)
			}
			p.doc = s.file.Doc.Text()
		}
		pkgs[s.dir] = p
	}
	for dir, p := range pkgs {
		want := "Package " + p.name + " "
		if p.name == "main" {
			want = "Command "
		}
		if !strings.HasPrefix(p.doc, want) {
			t.Errorf("%s: the package comment should begin with %q", dir, want)
		}
	}
}

// TestLeakChecks: a package that starts goroutines, and has tests, checks in
// TestMain that none is left.
func TestLeakChecks(t *testing.T) {
	starts, tests, checks := map[string]string{}, map[string]bool{}, map[string]bool{}
	for _, s := range sources(t) {
		if s.test {
			tests[s.dir] = true
			s.calls(func(pkg, name string, _ *ast.CallExpr) {
				if pkg == "testenv" && name == "Main" || pkg == "goleak" && name == "VerifyTestMain" || pkg == "" && s.dir == "internal/testenv" && name == "Main" {
					checks[s.dir] = true
				}
			})
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			if g, ok := n.(*ast.GoStmt); ok {
				starts[s.dir] = s.at(g)
			}
			return true
		})
	}
	for dir, at := range starts {
		if tests[dir] && !checks[dir] {
			t.Errorf("%s starts a goroutine (%s), but its tests have no TestMain with testenv.Main", dir, at)
		}
	}
}
