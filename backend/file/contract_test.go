package file

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/memferry/memferry"
	"github.com/memferry/memferry/backend/backendtest"
)

const contractSize = 1<<20 + 123

func TestContract(t *testing.T) {
	shm := "/dev/shm"
	if _, err := os.Stat(shm); err != nil {
		shm = t.TempDir()
	}
	for name, parent := range map[string]string{"disk": t.TempDir(), "memory": shm} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp(parent, "memferry-test-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			backendtest.Run(t, func(t testing.TB) memferry.Backend {
				path := filepath.Join(dir, "f")
				_ = os.Remove(path)
				b, err := Open(path, Options{Size: contractSize})
				if err != nil {
					t.Fatal(err)
				}
				return b
			}, backendtest.Options{})
		})
	}
}

func TestContractReadOnly(t *testing.T) {
	backendtest.Run(t, func(t testing.TB) memferry.Backend {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, make([]byte, contractSize), 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := Open(path, Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}, backendtest.Options{})
}

func TestContractMemfd(t *testing.T) {
	backendtest.Run(t, func(t testing.TB) memferry.Backend {
		b, err := NewMemfd("contract", contractSize)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}, backendtest.Options{})
}

func TestContractBlockDevice(t *testing.T) {
	device := loopDevice(t, 1<<20)
	backendtest.Run(t, func(t testing.TB) memferry.Backend {
		b, err := Open(device, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}, backendtest.Options{Filled: true, Steps: 2})
}
