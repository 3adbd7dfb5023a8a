package uffd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
	"github.com/memferry/memferry/backend/faulty"
	"github.com/memferry/memferry/backend/file"
	"github.com/memferry/memferry/internal/testenv"
	"github.com/memferry/memferry/region"
)

// hang is how long anything here may take before it counts as hung.
const hang = time.Minute

// ownerEnv makes the test binary an owner that waits to be killed.
const ownerEnv = "MEMFERRY_TEST_UFFD_OWNER"

func TestMain(m *testing.M) {
	if url := os.Getenv(plainEnv); url != "" && !slices.Contains(os.Args, HelperCommand) {
		plain(url)
	}
	if os.Getenv(otherEnv) != "" {
		other()
	}
	if helped, err := Helper(openTest); helped {
		if err != nil {
			fmt.Fprintln(os.Stderr, "helper:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if path := os.Getenv(ownerEnv); path != "" {
		own(path)
	}
	testenv.Main(m)
}

// openTest opens a path, behind a fault that its scheme names.
func openTest(_ context.Context, url string) (memferry.Backend, error) {
	kind, path, _ := strings.Cut(url, ":")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	b, err := file.New(f, file.Options{})
	if err != nil {
		return nil, err
	}
	read := faulty.Kinds(faulty.Read)
	rules := map[string][]faulty.Rule{
		"slow": {{When: read, Fault: faulty.Fault{Delay: time.Millisecond}}},
		"hang": {{When: faulty.And(read, faulty.Range(512<<10, 1<<30)), Fault: faulty.Fault{Hang: true}}},
	}
	if kind == "file" {
		return b, nil
	}
	return faulty.New(b, faulty.Options{Rules: rules[kind]}), nil
}

func sourceFile(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func helped(t testing.TB, url string, o Options) *Memory {
	t.Helper()
	m, err := OpenURL(testenv.Deadline(t, time.Minute), url, o)
	if errors.Is(err, memferry.ErrNotSupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func closed(t testing.TB, m *Memory) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestHelperContract: the same contract with the server in another process.
func TestHelperContract(t *testing.T) {
	path := sourceFile(t, nil)
	backendtest.Run(t, func(t testing.TB) memferry.Backend {
		for _, n := range []int64{0, 1<<20 + 300} {
			if err := os.Truncate(path, n); err != nil {
				t.Fatal(err)
			}
		}
		return helped(t, "file:"+path, Options{})
	}, backendtest.Options{Steps: 10})
}

// TestHelperSync: what was written reaches the source by Sync, and by Close.
func TestHelperSync(t *testing.T) {
	want := noise(t, 4<<20+100)
	path := sourceFile(t, want)
	m := helped(t, "file:"+path, Options{})
	defer closed(t, m)
	tracked(t, m)
	check := func() {
		t.Helper()
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the source differs from the memory (%v)", err)
		}
	}
	// More runs of pages than one message holds would take more memory; see
	// maxRuns. Every other page is a run.
	for i := 0; i < len(want); i += 2 * pageSize {
		want[i]++
		m.Bytes()[i]++
	}
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	check()
	copy(want[1<<20:], "written before the end")
	copy(m.Bytes()[1<<20:], "written before the end")
	closed(t, m)
	check()
}

// TestHelperErrors: what the helper can't open is the caller's error.
func TestHelperErrors(t *testing.T) {
	_, err := OpenURL(t.Context(), "file:/does/not/exist", Options{})
	if err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a file that does not exist: %v", err)
	}
	_, err = OpenURL(t.Context(), "file:"+sourceFile(t, nil), Options{})
	if !errors.Is(err, memferry.ErrOutOfRange) {
		t.Errorf("an empty file: %v", err)
	}
	_, err = OpenURL(t.Context(), "file:"+sourceFile(t, make([]byte, 100)), Options{ChunkSize: 5})
	if err == nil || !strings.Contains(err.Error(), "chunk") {
		t.Errorf("a chunk of 5 bytes: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if m, err := OpenURL(ctx, "file:"+sourceFile(t, make([]byte, 100)), Options{}); err == nil {
		closed(t, m) // it was faster
	}
}

// TestGarbageCollection: goroutines that fault inside the runtime, while the
// world is being stopped over and over. In one process this ends at once, and
// for ever: see TestDeadlock.
func TestGarbageCollection(t *testing.T) {
	duration := 30 * time.Second
	if testing.Short() {
		duration = 3 * time.Second
	}
	defer debug.SetGCPercent(debug.SetGCPercent(1))
	want := noise(t, 8<<20)
	url := "slow:" + sourceFile(t, want)
	var stop atomic.Bool
	var gc sync.WaitGroup
	gc.Go(func() {
		for !stop.Load() {
			runtime.GC()
		}
	})
	rounds := 0
	for end := time.Now().Add(duration); time.Now().Before(end) && !t.Failed(); rounds++ {
		m := helped(t, url, Options{Pull: region.PullNone, ChunkSize: 64 << 10})
		var wg sync.WaitGroup
		for i, use := range uses {
			wg.Go(func() { use(t, m.Bytes(), want, i<<20) })
		}
		wg.Go(func() { // fork copies what is mapped of the memory
			if err := exec.Command("true").Run(); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		closed(t, m)
	}
	stop.Store(true)
	gc.Wait()
	t.Logf("%d memories", rounds)
}

// uses are ways of touching memory inside the runtime, or between.
var uses = []func(t *testing.T, got, want []byte, off int){
	func(t *testing.T, got, want []byte, off int) {
		p := make([]byte, 1<<20)
		copy(p, got[off:])
		if !bytes.Equal(p, want[off:off+1<<20]) {
			t.Error("copy")
		}
	},
	func(t *testing.T, got, want []byte, off int) {
		if p := append([]byte(nil), got[off:off+1<<20]...); !bytes.Equal(p, want[off:off+1<<20]) {
			t.Error("append")
		}
	},
	func(t *testing.T, got, want []byte, off int) {
		if !bytes.Equal(got[off:off+1<<20], want[off:off+1<<20]) {
			t.Error("compare")
		}
	},
	func(t *testing.T, got, want []byte, off int) {
		keys := make(map[string]int)
		for i := off; i < off+1<<20; i += 512 {
			keys[string(got[i:i+16])] = i
		}
		for i := off; i < off+1<<20; i += 512 {
			if keys[string(want[i:i+16])] != i {
				t.Error("map")
				return
			}
		}
	},
	func(t *testing.T, got, want []byte, off int) {
		slices.Sort(got[off : off+1<<18])
		p := bytes.Clone(want[off : off+1<<18])
		slices.Sort(p)
		if !bytes.Equal(p, got[off:off+1<<18]) {
			t.Error("sort")
		}
	},
	func(t *testing.T, got, want []byte, off int) {
		copy(got[off:off+1<<20], want) // half of it is never read
		if !bytes.Equal(got[off:off+1<<20], want[:1<<20]) {
			t.Error("copy into")
		}
	},
}

// TestHelperKilled: what is here stays, what is not fails, and nothing hangs.
func TestHelperKilled(t *testing.T) {
	want := noise(t, 1<<20)
	m := helped(t, "hang:"+sourceFile(t, want), Options{Pull: region.PullNone, ChunkSize: 64 << 10, IOTimeout: time.Hour})
	if m.fd.Features()&wanted == 0 {
		closed(t, m)
		t.Skip("this kernel can't poison pages")
	}
	if err := m.Populate(0, 64<<10); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	before := stats(t, m).DemandWaits
	go func() { failed <- m.Populate(512<<10, pageSize) }()
	for stats(t, m).DemandWaits == before {
		time.Sleep(time.Millisecond)
	}
	r, ok := m.engine.(*remote)
	if !ok {
		t.Fatalf("engine is %T", m.engine)
	}
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errors.Is(err, memferry.ErrTimeout) {
		t.Errorf("a page that was on its way: %v", err)
	}
	if _, failed := load(m, 800<<10); !failed {
		t.Error("an absent page was read")
	}
	if !bytes.Equal(m.Bytes()[:64<<10], want[:64<<10]) {
		t.Error("what had arrived has changed")
	}
	m.Bytes()[0]++
	if err := m.Wait(t.Context()); err == nil {
		t.Error("everything is here, and nobody brought it")
	}
	if err := m.Sync(); !errors.Is(err, errNoSource) && m.tracker != nil {
		t.Errorf("sync: %v", err)
	}
	if err := m.Close(); !errors.Is(err, errNoSource) {
		t.Errorf("close: %v", err)
	}
}

// own opens a memory, touches it, tells the pid of the helper, and waits.
func own(path string) {
	m, err := OpenURL(context.Background(), "slow:"+path, Options{Pull: region.PullNone})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	m.Bytes()[0]++
	if r, ok := m.engine.(*remote); ok {
		fmt.Println("helper", r.cmd.Process.Pid)
	}
	select {}
}

// TestOwnerKilled: the helper goes with its owner.
func TestOwnerKilled(t *testing.T) {
	m := helped(t, "file:"+sourceFile(t, make([]byte, 100)), Options{}) // skips where there is none
	closed(t, m)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), ownerEnv+"="+sourceFile(t, noise(t, 1<<20)))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if err := errors.Join(cmd.Process.Kill()); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // it was killed
	pid, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "helper ")))
	if err != nil {
		t.Fatalf("the owner said %q", line)
	}
	deadline := testenv.Deadline(t, time.Minute)
	for running(pid) {
		if deadline.Err() != nil {
			t.Fatalf("the helper outlives its owner")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// running tells whether a process exists that is not a zombie.
func running(pid int) bool {
	if errors.Is(unix.Kill(pid, 0), syscall.ESRCH) {
		return false
	}
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, _ := bytes.Cut(p, []byte(") "))
	return len(state) > 0 && state[0] != 'Z'
}

// TestDeadlock documents what Open can't do: it never ends, so it only runs
// when MEMFERRY_TEST_DEADLOCK is set, under a timeout.
func TestDeadlock(t *testing.T) {
	if os.Getenv("MEMFERRY_TEST_DEADLOCK") == "" {
		t.Skip("hangs by design: set MEMFERRY_TEST_DEADLOCK=1 to see it")
	}
	want := noise(t, 8<<20)
	m := memory(t, source(t, want), Options{Pull: region.PullNone, ChunkSize: pageSize})
	var wg sync.WaitGroup
	for i := range runtime.GOMAXPROCS(0) {
		wg.Go(func() { copy(make([]byte, 1<<20), m.Bytes()[i<<20:]) })
	}
	wg.Wait()
	t.Error("no deadlock")
}

func TestWireErrors(t *testing.T) {
	if encodeError(nil).decode() != nil {
		t.Error("nil became an error")
	}
	for _, kind := range kinds {
		err := encodeError(fmt.Errorf("wrapped: %w", kind)).decode()
		if !errors.Is(err, kind) || !strings.HasPrefix(err.Error(), "wrapped: ") {
			t.Errorf("%v became %v", kind, err)
		}
	}
	if err := encodeError(io.ErrShortWrite).decode(); err.Error() != io.ErrShortWrite.Error() {
		t.Error(err)
	}
}
