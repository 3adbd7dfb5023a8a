package vm

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
)

// archive writes an initramfs: cpio in the "newc" format (cpio(5), and
// Documentation/driver-api/early-userspace/buffer-format.rst of the kernel).
// Directories come into being with what is put into them. Of two entries of
// one name the first counts.
type archive struct {
	w    *bufio.Writer
	off  int64
	ino  int
	seen map[string]bool
	err  error // the first; later calls do nothing
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), seen: map[string]bool{"/": true}}
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000

	trailer = "TRAILER!!!"
)

func (a *archive) has(name string) bool { return a.seen[path.Clean("/"+name)] }

// entry writes a header, to be followed by size bytes of data. It reports
// whether the entry is to be written at all.
func (a *archive) entry(name string, mode uint32, size int64) bool {
	name = path.Clean("/" + name)
	if a.err != nil || a.seen[name] {
		return false
	}
	a.dir(path.Dir(name))
	a.seen[name] = true
	a.header(name[1:], mode, size)
	return a.err == nil
}

func (a *archive) header(name string, mode uint32, size int64) {
	if size >= 1<<32 {
		a.fail(fmt.Errorf("%s: %d bytes are too much for an initramfs", name, size))
		return
	}
	a.ino++
	// magic, ino, mode, uid, gid, nlink, mtime, size, and device numbers of the
	// file's file system and of the file; the length of the name, a checksum.
	a.print("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0)
	a.print("%s\x00", name)
	a.pad()
}

func (a *archive) print(format string, args ...any) {
	n, err := fmt.Fprintf(a.w, format, args...)
	a.off += int64(n)
	a.fail(err)
}

func (a *archive) pad() {
	for a.err == nil && a.off%4 != 0 {
		a.print("\x00")
	}
}

func (a *archive) fail(err error) {
	if a.err == nil {
		a.err = err
	}
}

// dir makes a directory and those above it.
func (a *archive) dir(name string) {
	name = path.Clean("/" + name)
	if a.seen[name] {
		return
	}
	a.dir(path.Dir(name))
	a.seen[name] = true
	a.header(name[1:], modeDir|0o755, 0)
}

func (a *archive) symlink(name, target string) {
	if a.entry(name, modeLink|0o777, int64(len(target))) {
		a.print("%s", target)
		a.pad()
	}
}

func (a *archive) data(name string, perm fs.FileMode, text []byte) {
	if a.entry(name, modeFile|uint32(perm.Perm()), int64(len(text))) {
		n, err := a.w.Write(text)
		a.off += int64(n)
		a.fail(err)
		a.pad()
	}
}

// file copies a file of the host, following links.
func (a *archive) file(name, host string) {
	f, err := os.Open(host)
	if err != nil {
		a.fail(err)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		a.fail(err)
		return
	}
	if !a.entry(name, modeFile|uint32(st.Mode().Perm()), st.Size()) {
		return
	}
	n, err := io.CopyN(a.w, f, st.Size())
	a.off += n
	if err != nil {
		a.fail(fmt.Errorf("copy %s: %w", host, err))
	}
	a.pad()
}

// tree copies the regular files below a directory of the host.
func (a *archive) tree(name, host string) {
	a.fail(filepath.WalkDir(host, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(host, p)
		if err != nil {
			return err
		}
		switch to := path.Join(name, filepath.ToSlash(rel)); {
		case d.IsDir():
			a.dir(to)
		case d.Type().IsRegular():
			a.file(to, p)
		}
		return a.err
	}))
}

// close ends the archive.
func (a *archive) close() error {
	if a.err == nil {
		a.header(trailer, 0, 0)
	}
	if a.err == nil {
		a.err = a.w.Flush()
	}
	if a.err != nil {
		return fmt.Errorf("make the initramfs: %w", a.err)
	}
	return nil
}
