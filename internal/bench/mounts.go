package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// mounted is a file served by a process.
type mounted struct {
	*process
	path string // the file
	at   string // the mountpoint
	end  func(*mounted) error
}

// umount ends the mount and waits for it.
func (m *mounted) umount() error { return m.end(m) }

// mountpoint returns a new place for a mount.
func (e *Env) mountpoint() string {
	e.sockets++
	return filepath.Join(e.dir, "m"+strconv.Itoa(e.sockets))
}

// mount runs "memferry mount" in the foreground until the file is there. The
// mount ends with ctx at the latest.
func (e *Env) mount(ctx context.Context, uri string, flags ...string) (*mounted, error) {
	path := e.mountpoint()
	p, err := start(e.memferry, append(append([]string{"mount"}, flags...), uri, path)...)
	if err != nil {
		return nil, err
	}
	release := p.killWith(ctx)
	m := &mounted{p, path, path, func(m *mounted) error {
		defer release()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), runLimit)
		defer cancel()
		_, _, err := run(ctx, e.memferry, "umount", m.at)
		select {
		case <-m.done:
		case <-time.After(patience):
		}
		m.stop()
		// memferry removes the file that it made; what is left is an error.
		if _, left := os.Lstat(m.at); left == nil {
			err = errors.Join(err, fmt.Errorf("%s is still there after umount", m.at))
		}
		return err
	}}
	if err := p.until("mount", func() bool { return isFUSE(path) }); err != nil {
		p.stop()
		return nil, err
	}
	return m, nil
}

// nbdfuse mounts with libnbd's nbdfuse.
func (e *Env) nbdfuse(ctx context.Context, uri string) (*mounted, error) {
	dir := e.mountpoint()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	p, err := start("nbdfuse", filepath.Join(dir, "nbd"), uri)
	if err != nil {
		return nil, err
	}
	release := p.killWith(ctx)
	m := &mounted{p, filepath.Join(dir, "nbd"), dir, func(m *mounted) error {
		defer release()
		err := unix.Unmount(m.at, 0)
		if err != nil {
			err = fmt.Errorf("unmount nbdfuse: %w", err)
			_ = unix.Unmount(m.at, unix.MNT_DETACH)
		}
		select {
		case <-m.done:
		case <-time.After(patience):
		}
		m.stop()
		return errors.Join(err, os.Remove(m.at))
	}}
	if err := p.until("nbdfuse", func() bool { return isFUSE(dir) }); err != nil {
		p.stop()
		return nil, err
	}
	return m, nil
}

// FUSE compares mounted files whose data is local.
func FUSE(ctx context.Context, e *Env) error {
	if e.wants(fuseReads...) {
		if err := e.fuseReads(ctx); err != nil {
			return err
		}
	}
	return e.passthrough(ctx)
}

// fuseReads are the scenarios that compare with nbdfuse.
var fuseReads = []string{"O_DIRECT 1M read", "cat, cold", "4K random read, O_DIRECT", "mmap sequential, cold"}

func (e *Env) fuseReads(ctx context.Context) error {
	ours, err := e.localMount(ctx)
	if err != nil {
		return err
	}
	defer ours.close()
	theirs, err := e.localNbdfuse(ctx)
	if err != nil {
		return err
	}
	defer theirs.close()

	files := []struct {
		name string
		*localFile
	}{{"memferry", ours}, {"nbdfuse on nbdkit", theirs}}
	compare := func(scenario string, measure func(ctx context.Context, path string) ([]Value, error)) {
		var subjects []Subject
		for _, f := range files {
			subjects = append(subjects, Subject{f.name, func(ctx context.Context) ([]Value, error) {
				release := f.killWith(ctx)
				defer release()
				return measure(ctx, f.path)
			}})
		}
		e.Compare(ctx, "fuse", scenario, subjects...)
	}
	compare(fuseReads[0], func(ctx context.Context, path string) ([]Value, error) {
		v, err := e.fio(ctx, "--ioengine=psync", "--direct=1", "--filename="+path, "--rw=read", "--bs=1M")
		return only(v, "rate"), err
	})
	compare(fuseReads[1], func(_ context.Context, path string) ([]Value, error) {
		if err := forget(path); err != nil {
			return nil, err
		}
		took, _, err := cat(path, e.Size)
		return []Value{rate("rate", e.Size, took)}, err
	})
	compare(fuseReads[2], func(ctx context.Context, path string) ([]Value, error) {
		v, err := e.fio(ctx, "--ioengine=psync", "--direct=1", "--filename="+path, "--rw=randread", "--bs=4k")
		return only(v, "p50", "IOPS"), err
	})
	compare(fuseReads[3], func(ctx context.Context, path string) ([]Value, error) {
		if err := forget(path); err != nil {
			return nil, err
		}
		return e.mmapRead(ctx, path)
	})
	return ctx.Err()
}

// mmapRead reads a file once through a mapping, in another process: this one
// must be able to collect garbage meanwhile.
func (e *Env) mmapRead(ctx context.Context, path string) ([]Value, error) {
	_, out, err := run(ctx, "fio", "--name=bench", "--ioengine=mmap", "--filename="+path, "--rw=read", "--bs=1M",
		"--size="+strconv.FormatInt(e.Size, 10), "--output-format=terse", "--terse-version=3", "--invalidate=1")
	if err != nil {
		return nil, err
	}
	kib, err := terseReadBandwidth(out)
	return []Value{{"rate", "MB/s", Higher, kib * 1024 / 1e6}}, err
}

// passthrough compares a complete read-only mount with the file under it.
func (e *Env) passthrough(ctx context.Context) error {
	const scenario = "passthrough 1M read"
	if !e.wants(scenario) {
		return nil
	}
	m, err := e.localMount(ctx, "--read-only", "--cache", filepath.Join(e.dir, "passthrough"))
	if err != nil {
		return err
	}
	defer m.close()
	plain, err := e.copyData("plain")
	if err != nil {
		return err
	}
	var subjects []Subject
	for _, f := range []struct{ name, path string }{{"memferry", m.path}, {"tmpfs", plain}} {
		subjects = append(subjects, Subject{f.name, func(ctx context.Context) ([]Value, error) {
			v, err := e.fio(ctx, "--ioengine=psync", "--filename="+f.path, "--rw=read", "--bs=1M", "--invalidate=0", "--readonly")
			return only(v, "rate"), err
		}})
	}
	e.Compare(ctx, "fuse", scenario, subjects...)
	return ctx.Err()
}

// localFile is a mount with all that stands behind it.
type localFile struct {
	*mounted
	close func()
}

// localMount mounts the data and waits until all of it is here.
func (e *Env) localMount(ctx context.Context, flags ...string) (*localFile, error) {
	at, err := e.endpoint("unix")
	if err != nil {
		return nil, err
	}
	s, err := serverAt(at, e.memferry, "serve", "--listen", listenURL(at), "d="+e.data)
	if err != nil {
		return nil, err
	}
	m, err := e.mount(ctx, at.uri("d"), flags...)
	if err != nil {
		s.stop()
		return nil, err
	}
	f := &localFile{m, func() {
		if err := m.umount(); err != nil {
			e.logf("umount: %v", err)
		}
		s.stop()
	}}
	limited, cancel := context.WithTimeout(ctx, runLimit)
	defer cancel()
	release := m.killWith(limited)
	defer release()
	if _, _, err := cat(m.path, e.Size); err != nil {
		f.close()
		return nil, err
	}
	// Its last chunks may still be landing, and a file is only passed through
	// once the ordinary handle is gone.
	time.Sleep(500 * time.Millisecond)
	return f, nil
}

// localNbdfuse mounts nbdkit's memory on this machine.
func (e *Env) localNbdfuse(ctx context.Context) (*localFile, error) {
	at, err := e.endpoint("unix")
	if err != nil {
		return nil, err
	}
	s, err := nbdkit(at, "memory", strconv.FormatInt(e.Size, 10))
	if err != nil {
		return nil, err
	}
	if _, _, err := run(ctx, "nbdcopy", e.data, at.uri("")); err != nil {
		s.stop()
		return nil, err
	}
	m, err := e.nbdfuse(ctx, at.uri(""))
	if err != nil {
		s.stop()
		return nil, err
	}
	return &localFile{m, func() {
		if err := m.umount(); err != nil {
			e.logf("umount: %v", err)
		}
		s.stop()
	}}, nil
}
