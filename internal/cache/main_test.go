package cache

import (
	"log/slog"
	"os"
	"testing"

	"github.com/memferry/memferry/internal/testenv"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(envVictim); dir != "" {
		victim(dir)
	}
	testenv.Main(m)
}

// openStore loads a cache and begins a session on the given boot.
func openStore(d fsys, boot string, limit int64) (*store, error) {
	s, err := loadStore(d, boot)
	if err != nil {
		return nil, err
	}
	s.limit, s.logger = limit, slog.New(slog.DiscardHandler)
	if err := s.beginSession(boot); err != nil {
		s.abandon()
		return nil, err
	}
	return s, nil
}
