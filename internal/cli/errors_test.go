package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// oneForm is what every failure looks like: WHAT: WHY; REMEDY, on one line.
var oneForm = regexp.MustCompile(`^memferry: [^\n]+; [^\n]+\n$`)

// TestMistakesHaveOneForm makes the mistakes that people make. Each gives one
// line that names the thing and the remedy, and the status of its kind.
func TestMistakesHaveOneForm(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.img")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	full := filepath.Join(dir, "full")
	if err := os.MkdirAll(filepath.Join(full, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	linked := filepath.Join(dir, "linked")
	if err := os.Symlink(file, linked); err != nil {
		t.Fatal(err)
	}
	missing, long := filepath.Join(dir, "missing"), strings.Repeat("x", 120)
	for _, c := range []struct {
		status int
		names  string // what the line has to have in it
		args   string
	}{
		{2, "0 arguments", "serve"},
		{2, "--max-connections 0", "serve --max-connections 0 " + file},
		{2, "--max-in-flight -1", "serve --max-in-flight -1 " + file},
		{2, "--max-memory 1 MiB", "serve --max-memory 1M " + file},
		{2, "--max-request 1 KiB", "serve --max-request 1K " + file},
		{2, "--handshake-timeout -5s", "serve --handshake-timeout -5s " + file},
		{2, "--io-timeout 0s", "serve --io-timeout 0s " + file},
		{1, "write mem:?size=1G", "serve mem:"},
		{1, "write it as 4096, 512K or 1.5GiB", "serve mem:?size=12Q"},
		{1, "mem: takes size", "serve mem:?sise=1G"},
		{1, "there are dir:, file:", "serve wat://x"},
		{1, missing, "serve " + missing},
		{1, "that this machine has", "serve --insecure --listen nbd://192.0.2.1 " + file},
		{1, "use a shorter", "serve --listen nbd+unix:///?socket=/" + long + " " + file},
		{1, "metrics: ", "serve --listen nbd+unix:///?socket=" + dir + "/s --metrics nonsense " + file},
		{1, "is the server running", "mount nbd+unix:///d?socket=" + missing + " " + dir + "/m"},
		{1, "is the server running", "info nbd://127.0.0.1:1/d"},
		{1, "full is not empty: in use; choose", "mount " + file + " " + full},
		{1, "mkdir -p", "mount " + file + " " + missing + "/m"},
		{1, "overlaps with the source", "mount " + file + " " + file},
		{1, "overlaps with the source", "mount " + file + " " + linked},
		{1, "overlaps with the source", "mount file://" + file + " " + full + "/../a.img"},
		{1, "overlaps with the source", "mount dir://" + full + "?size=1M " + full + "/x"},
		{1, "overlaps with the cache", "mount --cache " + full + " " + file + " " + full + "/m"},
		{1, "overlaps with the cache", "mount --cache " + missing + " " + file + " " + missing},
		{1, "overlaps with the cache", "mount --cache " + full + "/x/c " + file + " " + full + "/x"},
		{2, "--connections 999999: want a number from 1 to 16", "mount --connections 999999 " + file + " " + dir + "/m"},
		{2, "--connections -1", "copy --connections -1 " + file + " " + missing},
		{1, "a part of it", "mount --cache " + file + " " + file + " " + dir + "/m"},
		{2, "--rate", "mount --rate -5 a b"},
		{1, "not a memferry mount", "umount " + dir},
		{1, "not a memferry mount", "status " + missing},
		{1, "are the same file", "copy " + file + " " + file},
		{1, "too small", "copy " + file + " mem:?size=4K"},
		{1, "too small", "copy " + file + " dir://" + dir + "/small?size=4K&chunk=4K"},
		{1, missing, "copy " + missing + " " + dir + "/copy"},
		{1, "write nbd://HOST", "ls foo"},
		{2, `unknown command "nosuch"`, "completion nosuch"},
		{1, "man: ", "man " + missing},
	} {
		t.Run(c.args, func(t *testing.T) {
			var out lockedBuffer
			status := Main(Env{
				Args: strings.Fields(c.args), Stdout: &out, Stderr: &out,
				Getenv: func(string) string { return "" },
			})
			got := out.String()
			if status != c.status || !oneForm.MatchString(got) || !strings.Contains(got, c.names) {
				t.Errorf("status %d, want %d; said\n%swanted one line with %q and a remedy", status, c.status, got, c.names)
			}
		})
	}
	left, err := filepath.Glob(dir + "/*")
	if err != nil || fmt.Sprint(left) != fmt.Sprint([]string{file, full, linked}) {
		t.Errorf("left behind: %v (error %v)", left, err)
	}
}

// TestReadmeCommands gives the commands of the README's quick start, as written
// but for the names of hosts and files. Each gets as far as the network.
func TestReadmeCommands(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	disk := filepath.Join(dir, "served")
	if err := os.WriteFile(disk, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	here := strings.NewReplacer("/srv/disk.img", disk, "/var/cache/disk", dir+"/cache", " disk.img", " "+dir+"/disk.img",
		"0.0.0.0", "192.0.2.1", "server:10809", "127.0.0.1:1")
	wants := map[string]string{
		"serve":  "give an address that this machine has", // it would listen
		"mount":  "is the server running",
		"umount": "not a memferry mount",
	}
	for line := range strings.Lines(string(readme)) {
		line, _, _ = strings.Cut(line, "#")
		args := strings.Fields(here.Replace(line))
		if len(args) < 2 || args[0] != "memferry" || wants[args[1]] == "" {
			continue
		}
		var out lockedBuffer
		Main(Env{Args: args[1:], Stdout: &out, Stderr: &out})
		if args[1] == "serve" && !slices.Contains(args, "--insecure") {
			t.Errorf("%s: would be refused beyond this host", strings.TrimSpace(line))
		}
		if !strings.Contains(out.String(), wants[args[1]]) {
			t.Errorf("%s: said\n%swanted %q", strings.TrimSpace(line), out.String(), wants[args[1]])
		}
		delete(wants, args[1])
	}
	if len(wants) > 0 {
		t.Errorf("the README shows no %v", wants)
	}
}
