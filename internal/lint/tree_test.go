package lint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/memferry/memferry"

// root is the top of the repository, seen from this package.
const root = "../.."

// source is one Go file of the module.
type source struct {
	path  string // from the top of the repository, with slashes
	dir   string // its directory; "." is the root package
	test  bool
	fset  *token.FileSet
	file  *ast.File
	lines int
}

// at formats the place of a node.
func (s source) at(n ast.Node) string {
	return s.path + ":" + strconv.Itoa(s.fset.Position(n.Pos()).Line)
}

// imports lists what the file imports, this module's packages by their
// directory prefixed with "./".
func (s source) imports() []string {
	var out []string
	for _, i := range s.file.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			continue
		}
		if p == module {
			p = "."
		} else if rest, ok := strings.CutPrefix(p, module+"/"); ok {
			p = "./" + rest
		}
		out = append(out, p)
	}
	return out
}

// files lists every file of the repository that a person wrote, from its top.
// A directory with a go.mod of its own is another module, and left out unless
// otherModules is set.
func files(t *testing.T, otherModules bool) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := filepath.ToSlash(strings.TrimPrefix(strings.TrimPrefix(p, root), "/"))
		if d.IsDir() {
			switch rel {
			case ".git", "bin", ".cache":
				return fs.SkipDir
			}
			if rel != "" && !otherModules {
				if _, err := os.Stat(filepath.Join(p, "go.mod")); err == nil {
					return fs.SkipDir
				}
			}
			return nil
		}
		if d.Type().IsRegular() && rel != ".git" {
			out = append(out, rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// sources parses the Go files of the module.
func sources(t *testing.T) []source {
	t.Helper()
	var out []source
	for _, name := range files(t, false) {
		if !strings.HasSuffix(name, ".go") || strings.Contains(name, "testdata/") {
			continue
		}
		text := read(t, name)
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		out = append(out, source{
			path: name, dir: path.Dir(name), test: strings.HasSuffix(name, "_test.go"),
			fset: fset, file: f, lines: strings.Count(text, "\n"),
		})
	}
	if len(out) < 10 {
		t.Fatalf("found only %d Go files", len(out))
	}
	return out
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// calls visits each call of pkg.Name, or of a plain Name where pkg is "".
func (s source) calls(visit func(pkg, name string, call *ast.CallExpr)) {
	ast.Inspect(s.file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		switch f := call.Fun.(type) {
		case *ast.Ident:
			visit("", f.Name, call)
		case *ast.SelectorExpr:
			if x, ok := f.X.(*ast.Ident); ok {
				visit(x.Name, f.Sel.Name, call)
			}
		}
		return true
	})
}

// within tells whether dir is one of the given directories or below one whose
// name ends in "/...".
func within(dir string, patterns ...string) bool {
	for _, p := range patterns {
		if base, ok := strings.CutSuffix(p, "/..."); ok {
			if dir == base || strings.HasPrefix(dir, base+"/") {
				return true
			}
		} else if dir == p {
			return true
		}
	}
	return false
}
