package lint

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func documents(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, f := range files(t, true) {
		if strings.HasSuffix(f, ".md") {
			out = append(out, f)
		}
	}
	return out
}

var link = regexp.MustCompile(`\]\(([^)\s]+)\)`)

func TestLinks(t *testing.T) {
	for _, doc := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(read(t, doc), -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if target == "" || strings.Contains(target, "://") {
				continue
			}
			p := path.Join(path.Dir(doc), target)
			if _, err := os.Stat(filepath.Join(root, p)); errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s links to %s, which is not there", doc, m[1])
			}
		}
	}
}

var makeCommand = regexp.MustCompile("(?m)(?:`|^ {4}|^)make ([a-z][a-z -]*)")

// TestMakeTargets: what the documents tell people to run exists.
func TestMakeTargets(t *testing.T) {
	makefile := read(t, "Makefile")
	checked := 0
	for _, doc := range documents(t) {
		for _, m := range makeCommand.FindAllStringSubmatch(read(t, doc), -1) {
			for _, target := range strings.Fields(m[1]) {
				checked++
				if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(target) + `:`).MatchString(makefile) {
					t.Errorf("%s says \"make %s\": the Makefile has no such target", doc, target)
				}
			}
		}
	}
	if checked < 5 {
		t.Errorf("found only %d make commands in the documents", checked)
	}
}

// TestReadmeCommands: the two commands of the README, which CI runs as they
// stand there.
func TestReadmeCommands(t *testing.T) {
	readme := read(t, "README.md")
	for _, command := range []string{"go run ./cmd/memferry demo", "make test"} {
		if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(command) + `( +#.*)?$`).MatchString(readme) {
			t.Errorf("README.md lacks the command %q on a line of its own", command)
		}
	}
}

// TestReadmeExample: the Go code of the README is that of an example that the
// compiler has seen.
func TestReadmeExample(t *testing.T) {
	_, rest, _ := strings.Cut(read(t, "README.md"), "```go\n")
	code, _, ok := strings.Cut(rest, "```")
	if !ok || strings.Contains(rest[len(code):], "```go\n") {
		t.Fatal("README.md should have one block of Go")
	}
	var body strings.Builder
	for line := range strings.Lines(code) {
		if line != "\n" {
			body.WriteByte('\t')
		}
		body.WriteString(line)
	}
	const example = "region/example_test.go"
	if !strings.Contains(read(t, example), " error {\n"+body.String()+"}\n") {
		t.Errorf("no function of %s has the body that README.md shows:\n%s", example, body.String())
	}
}

// TestFuzzTargets: "make fuzz" finds every target the parser finds.
func TestFuzzTargets(t *testing.T) {
	var want []string
	for _, s := range sources(t) {
		if !s.test {
			continue
		}
		for _, d := range s.file.Decls {
			if name := fuzzTarget(d); name != "" {
				want = append(want, "./"+s.dir+" "+name)
			}
		}
	}
	out, err := exec.Command("bash", filepath.Join(root, "scripts/fuzz"), "--list").CombinedOutput()
	if err != nil {
		t.Fatalf("scripts/fuzz --list: %v\n%s", err, out)
	}
	got := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("scripts/fuzz --list finds\n%s\nthe tree has\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// forbidden must not appear in the repository: paths of somebody's machine and
// hosts of package registries. They are spelled in two parts so that this file
// passes.
var forbidden = []string{
	"/wor" + "k/", "/home" + "/", "proxy.golang" + ".org", "sum.golang" + ".org", "deb.debian" + ".org", "snapshot.debian" + ".org",
	"registry.npmjs" + ".org", "pypi" + ".org", "/root" + "/.",
}

func TestForbiddenWords(t *testing.T) {
	for _, f := range files(t, true) {
		if strings.HasSuffix(f, "go.sum") {
			continue
		}
		text := read(t, f)
		for _, word := range forbidden {
			if i := strings.Index(text, word); i >= 0 {
				t.Errorf("%s:%d holds %q", f, 1+strings.Count(text[:i], "\n"), word)
			}
		}
	}
}

// TestScripts: every script can be run and has a strict mode.
func TestScripts(t *testing.T) {
	for _, f := range files(t, false) {
		if !within(path.Dir(f), "scripts", ".ci") {
			continue
		}
		info, err := os.Stat(filepath.Join(root, f))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode()&0o111 == 0 {
			t.Errorf("%s is not executable", f)
		}
		if text := read(t, f); !strings.HasPrefix(text, "#!/usr/bin/env bash\n") || !strings.Contains(text, "set -euo pipefail") {
			t.Errorf("%s should start with #!/usr/bin/env bash and set -euo pipefail", f)
		}
	}
}
