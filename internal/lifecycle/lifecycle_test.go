package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/memferry/memferry/internal/testenv"
)

// childEnv makes the test binary play the part of a daemon.
const childEnv = "MEMFERRY_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		testenv.Main(m)
	case "ready":
		r := TakeReadiness()
		fmt.Println("before")
		r.Ready("mounted \"a\nb\"")
		r.Failed("too late")
		// Its own session, and no controlling terminal.
		if sid, err := unixGetsid(); err != nil || sid != os.Getpid() {
			os.Exit(3)
		}
		os.Exit(0)
	case "failed":
		TakeReadiness().Failed("mount: no such export; try another")
		os.Exit(1)
	case "dies":
		os.Exit(7)
	case "hangs":
		time.Sleep(time.Minute)
	}
}

func unixGetsid() (int, error) {
	sid, _, errno := syscall.Syscall(syscall.SYS_GETSID, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(sid), nil
}

func child(kind string) Daemon {
	return Daemon{Env: append(os.Environ(), childEnv+"="+kind)}
}

func TestDaemonReady(t *testing.T) {
	d := child("ready")
	d.LogFile = filepath.Join(t.TempDir(), "log")
	pid, said, err := d.Start(t.Context())
	if err != nil || said != "mounted \"a\nb\"" || pid <= 0 {
		t.Fatalf("Start = %d, %q, %v", pid, said, err)
	}
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil || status.ExitStatus() != 0 {
		t.Errorf("child: %v, status %v; want its own session", err, status)
	}
	log, err := os.ReadFile(d.LogFile)
	if err != nil || string(log) != "before\n" {
		t.Errorf("log file %q, %v", log, err)
	}
}

func TestDaemonFailed(t *testing.T) {
	_, _, err := child("failed").Start(t.Context())
	if !errors.Is(err, ErrDaemon) || err.Error() != "mount: no such export; try another" {
		t.Errorf("Start: %v", err)
	}
}

func TestDaemonDies(t *testing.T) {
	_, _, err := child("dies").Start(t.Context())
	if err == nil || errors.Is(err, ErrDaemon) || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("Start: %v", err)
	}
}

func TestDaemonInterrupted(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("enough"))
	defer cancel()
	_, _, err := child("hangs").Start(ctx)
	if err == nil || err.Error() != "enough" {
		t.Errorf("Start: %v, want the cause", err)
	}
}

func TestDaemonLogFileUnusable(t *testing.T) {
	d := child("ready")
	d.LogFile = filepath.Join(t.TempDir(), "no", "log")
	if _, _, err := d.Start(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Start: %v", err)
	}
}

func TestReadinessNobodyWaits(t *testing.T) {
	for _, r := range []*Readiness{nil, {}} {
		if r.Background() {
			t.Error("Background() without a parent")
		}
		r.Ready("x")
		r.Failed("x")
	}
}

func TestStackOrderAndErrors(t *testing.T) {
	var s Stack
	var order []string
	add := func(name string, err error) {
		t.Helper()
		if err := s.PushCloser(name, func() error { order = append(order, name); return err }); err != nil {
			t.Fatal(err)
		}
	}
	boom, bang := errors.New("boom"), errors.New("bang")
	add("backend", boom)
	add("region", nil)
	add("mount", bang)
	err := s.Close(t.Context())
	if d := cmp.Diff([]string{"mount", "region", "backend"}, order); d != "" {
		t.Errorf("order (-want +got)\n%s", d)
	}
	if !errors.Is(err, boom) || !errors.Is(err, bang) || err.Error() != "mount: bang\nbackend: boom" {
		t.Errorf("Close: %v", err)
	}
	if again := s.Close(t.Context()); again != err { //nolint:errorlint // the very same
		t.Errorf("second Close: %v", again)
	}
	if err := s.PushCloser("late", func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("Push after Close: %v, want it run at once", err)
	}
}

func TestStackGivesUpOnAStuckStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Stack
		stuck := make(chan struct{})
		ran := false
		_ = s.PushCloser("after", func() error { ran = true; return nil })
		_ = s.Push("stuck", time.Minute, func(context.Context) error { <-stuck; return nil })
		start := time.Now()
		err := s.Close(t.Context())
		if !errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(err.Error(), "stuck: ") {
			t.Errorf("Close: %v", err)
		}
		if !ran {
			t.Error("the step after the stuck one did not run")
		}
		if d := time.Since(start); d != time.Minute+grace {
			t.Errorf("took %v", d)
		}
		close(stuck)
	})
}

func TestStackHardStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Stack
		_ = s.Push("slow", time.Hour, func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) })
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(&SignalError{syscall.SIGINT})
		if err := s.Close(ctx); err == nil || err.Error() != "slow: interrupted by interrupt" {
			t.Errorf("Close: %v", err)
		}
	})
}

func TestSignals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ch := make(chan os.Signal, 2)
		s := watch(t.Context(), ch)
		defer s.Stop()
		ch <- syscall.SIGTERM
		synctest.Wait()
		var sig *SignalError
		if !errors.As(context.Cause(s.Context()), &sig) || sig.Signal != syscall.SIGTERM {
			t.Errorf("cause %v", context.Cause(s.Context()))
		}
		if !errors.Is(context.Cause(s.Context()), context.Canceled) {
			t.Error("a signal is no cancellation")
		}
		if s.Hard().Err() != nil {
			t.Error("the first signal gave up")
		}
		ch <- syscall.SIGINT
		synctest.Wait()
		if s.Hard().Err() == nil {
			t.Error("the second signal did not give up")
		}
	})
}

func TestParentEndsSoftly(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := Unwatched(ctx)
	defer s.Stop()
	cancel()
	<-s.Context().Done()
	if s.Hard().Err() != nil {
		t.Error("the end of the parent gave up")
	}
	s.Stop()
	s.Stop()
}
