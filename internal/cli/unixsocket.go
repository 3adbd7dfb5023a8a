package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/memferry/memferry"
)

// listenUnix listens on a UNIX socket. A socket that a dead process left is
// cleared away; one that somebody listens on, and anything that is no socket,
// is refused. The socket file goes with the listener.
func listenUnix(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if !errors.Is(err, syscall.EADDRINUSE) {
		return l, err
	}
	info, err := os.Lstat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return nil, withRemedy(fmt.Errorf("%s is no socket: %w", path, memferry.ErrInUse), "choose another path")
		}
		c, err := net.DialTimeout("unix", path, 2*time.Second)
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, withRemedy(fmt.Errorf("%s: another server listens there: %w", path, memferry.ErrInUse), "end it, or choose another path")
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("clear the dead socket: %w", err)
		}
	}
	return net.Listen("unix", path)
}
