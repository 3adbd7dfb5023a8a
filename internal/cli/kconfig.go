package cli

import (
	"bufio"
	"compress/gzip"
	"io"
	"os"
	"strings"
)

// kernelConfig returns the value of an option of the running kernel ("y", "m",
// or "n" where it is not set), "" where the configuration can't be read.
func kernelConfig(option string) string {
	if f, err := os.Open("/proc/config.gz"); err == nil {
		defer f.Close()
		if z, err := gzip.NewReader(f); err == nil {
			return scanConfig(z, option)
		}
	}
	_, _, release := kernelRelease()
	f, err := os.Open("/boot/config-" + release)
	if err != nil {
		return ""
	}
	defer f.Close()
	return scanConfig(f, option)
}

func scanConfig(r io.Reader, option string) string {
	s := bufio.NewScanner(r)
	for s.Scan() {
		if v, ok := strings.CutPrefix(s.Text(), option+"="); ok {
			return v
		}
	}
	if s.Err() != nil {
		return ""
	}
	return "n"
}
