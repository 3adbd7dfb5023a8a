package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry/internal/netsim"
	"github.com/memferry/memferry/internal/testenv"
)

// holesIn walks over a file by SEEK_DATA and SEEK_HOLE and returns how many
// bytes it calls holes. It fails where one of them is not zero in want.
func holesIn(t testing.TB, f *os.File, want []byte) (holes int64) {
	t.Helper()
	size := int64(len(want))
	zeroes := make([]byte, size)
	for off := int64(0); off < size; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data, err = size, nil
		}
		if err != nil || data < off || data > size {
			t.Fatalf("SEEK_DATA from %d: %d, %v", off, data, err)
		}
		if i := firstDifference(want[off:data], zeroes[off:data]); i >= 0 {
			t.Fatalf("SEEK_DATA from %d skips to %d, over data at %d", off, data, off+int64(i))
		}
		holes += data - off
		if data == size {
			break
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil || hole <= data || hole > size {
			t.Fatalf("SEEK_HOLE from the data at %d: %d, %v", data, hole, err)
		}
		if hole < size && want[hole] != 0 {
			t.Fatalf("SEEK_HOLE from %d claims a hole at %d, where data is", data, hole)
		}
		off = hole
	}
	return holes
}

// TestMountSeek asks for data and holes before anything is pulled, while the
// pull runs, and after it, with writes and holes of its own in between.
func TestMountSeek(t *testing.T) {
	const size = 48*mib + 500
	data := map[int64][]byte{}
	for i := range int64(6) {
		data[(1+8*i)*mib+4096*i] = pattern(uint64(70+i), mib+100*i)
	}
	content := func() []byte {
		want := make([]byte, size)
		for off, p := range data {
			copy(want[off:], p)
		}
		return want
	}
	change := func(t *testing.T, f *os.File, want []byte) {
		for i, off := range []int64{mib + 8192, 4 * mib, 12*mib + 5, 40*mib + 100, size - 200} {
			p := pattern(uint64(80+i), 9000)
			copy(want[off:], p)
			if _, err := f.WriteAt(p[:min(9000, size-off)], off); err != nil {
				t.Fatal(err)
			}
		}
		for _, off := range []int64{9*mib + 50_000, 17 * mib, 4*mib + 4096} {
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, 300_000); err != nil {
				t.Fatal(err)
			}
			clear(want[off : off+300_000])
		}
	}
	for _, side := range []string{"memory", "cache", "direct"} {
		t.Run(side, func(t *testing.T) {
			want := content()
			disk := sparse(t, size, data)
			s := serve(t, "disk="+disk)
			far := netsim.Link{RTT: 10 * time.Millisecond, Bandwidth: 2 << 20} // the pull takes seconds
			if side == "direct" {
				far.Bandwidth = 0
			}
			_, socket := link(t, s.socket, far)
			flags := map[string][]string{
				"direct": {"--direct"}, "cache": {"--cache", filepath.Join(t.TempDir(), "cache")},
			}[side]
			t.Run("nothing pulled", func(t *testing.T) {
				if side == "direct" {
					return // never is
				}
				m := mount(t, unixURI(socket, "disk"), filepath.Join(t.TempDir(), "disk"), "--pull=none")
				if holes := holesIn(t, m.open(unix.O_RDONLY), want); holes < size/2 {
					t.Errorf("%d of %d bytes are holes", holes, size)
				}
				if n := m.status().Region.PulledBytes; n != 0 {
					t.Errorf("%d bytes were pulled for it", n)
				}
			})
			m := mount(t, unixURI(socket, "disk"), filepath.Join(t.TempDir(), "disk"), flags...)
			f := m.open(unix.O_RDWR)
			holesIn(t, f, want)
			during := 0
			for side != "direct" && !m.status().Region.PullComplete {
				holesIn(t, f, want)
				if during++; during == 2 {
					change(t, f, want)
				}
			}
			if during < 2 {
				if side != "direct" {
					t.Error("the pull was over before anything was asked")
				}
				change(t, f, want)
			}
			if holes := holesIn(t, f, want); holes < size/2 {
				t.Errorf("in the end, %d of %d bytes are holes", holes, size)
			}
			holds(t, m.path, want)
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			m.umount()
			holds(t, disk, want)
		})
	}
}

// TestMountPassthrough stops the process that serves a mount, and reads all of
// it: only the kernel can have answered. Where the kernel has to ask, the same
// read waits.
func TestMountPassthrough(t *testing.T) {
	testenv.FUSE(t)
	if why := missingFeature(t, string(output(t, memferry, "doctor", "--json")), "fuse passthrough"); why != "" {
		t.Skip("needs FUSE passthrough: " + why)
	}
	const size = 8*mib + 123
	content := pattern(90, size)
	disk := file(t, "disk", content)
	s := serve(t, "disk="+disk)
	for _, side := range []string{"memory", "cache"} {
		t.Run(side, func(t *testing.T) {
			flags := []string{"--read-only"}
			if side == "cache" {
				flags = append(flags, "--cache", filepath.Join(t.TempDir(), "cache"))
			}
			m := mount(t, s.uri("disk"), filepath.Join(t.TempDir(), "disk"), flags...)
			m.pulled()
			var f *os.File
			// What looks at every new file may hold it for a moment.
			m.eventually("passthrough", func() error {
				f = m.open(unix.O_RDONLY)
				if m.status().Passthrough {
					return nil
				}
				f.Close()
				return errors.New("the status says that there is none")
			})
			before := m.status()
			m.frozen(func() {
				got := make([]byte, size)
				if n, err := f.ReadAt(got, 0); n != int(size) || err != nil || !bytes.Equal(got, content) {
					t.Errorf("read from the kernel alone: %d, %v, or other bytes", n, err)
				}
				p, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
				if err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(p, content) {
					t.Error("the mapping has other bytes")
				}
				if err := unix.Munmap(p); err != nil {
					t.Error(err)
				}
			})
			if after := m.status(); after.Region != before.Region {
				t.Errorf("the region was asked: %+v, before %+v", after.Region, before.Region)
			}
			if _, err := unix.Pwrite(int(f.Fd()), []byte("x"), 0); err == nil {
				t.Error("it can be written")
			}
			f.Close()
			m.umount()
		})
	}
	t.Run("not where it can be written", func(t *testing.T) {
		m := mount(t, s.uri("disk"), filepath.Join(t.TempDir(), "disk"))
		m.pulled()
		var dd *process
		m.frozen(func() {
			dd = start(t, "dd", "if="+m.path, "of=/dev/null", "bs=1M", "iflag=direct")
			select {
			case <-dd.done:
				t.Errorf("the kernel read a writable mount by itself: %v\n%s", dd.err, dd.out.String())
			case <-time.After(200 * time.Millisecond): // it could wait for ever
			}
		})
		select {
		case <-dd.done:
			if dd.err != nil {
				t.Errorf("dd: %v\n%s", dd.err, dd.out.String())
			}
		case <-time.After(hang):
			t.Error("dd does not end")
		}
		if m.status().Passthrough {
			t.Error("the status says passthrough")
		}
		m.umount()
		holds(t, disk, content)
	})
}

// frozen runs f while the process that serves the mount is stopped. If f waits
// for that process after all, it goes on in the end.
func (m *mounted) frozen(f func()) {
	m.t.Helper()
	m.signal(unix.SIGSTOP)
	defer m.signal(unix.SIGCONT)
	hung := time.AfterFunc(time.Minute, func() {
		m.signal(unix.SIGCONT)
		m.t.Error("it waits for the process that serves the mount")
	})
	defer hung.Stop()
	m.eventually("the process to stop", func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.pid()))
		if err != nil {
			return err
		}
		if state := bytes.TrimSpace(b[bytes.LastIndexByte(b, ')')+1:]); len(state) == 0 || state[0] != 'T' {
			return fmt.Errorf("its state is %.1s", state)
		}
		return nil
	})
	f()
}

// missingFeature returns why doctor says that a feature is not there, "" if it
// is.
func missingFeature(t testing.TB, doctor, name string) string {
	t.Helper()
	var found []struct {
		Feature, Detail string
		OK              bool
	}
	if err := json.Unmarshal([]byte(doctor), &found); err != nil {
		t.Fatalf("doctor --json: %v\n%s", err, doctor)
	}
	for _, f := range found {
		if f.Feature == name {
			if f.OK {
				return ""
			}
			return f.Detail
		}
	}
	t.Fatalf("doctor says nothing of %q:\n%s", name, doctor)
	return ""
}
