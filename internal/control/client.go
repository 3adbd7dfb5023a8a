package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/memferry/memferry"
)

// ErrNotMounted is returned where no mount answers for a path.
var ErrNotMounted = errors.New("not a memferry mount")

// maxAnswer bounds the answer of a mount, in bytes.
const maxAnswer = 4 << 20

// Client talks to one mount.
type Client struct {
	path string // of the socket
	http *http.Client
}

// Find returns the client of the mount at the absolute path mountpoint, or
// [ErrNotMounted].
func Find(dirs []string, mountpoint string) (*Client, error) {
	for _, dir := range dirs {
		c, err := dial(dir, socketName(mountpoint))
		if err != nil || c != nil {
			return c, err
		}
	}
	return nil, fmt.Errorf("%s: %w", mountpoint, ErrNotMounted)
}

// All returns the clients of every mount of this user. Dead sockets found on
// the way are removed.
func All(dirs []string) ([]*Client, error) {
	var cs []*Client
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), ".sock") {
				continue
			}
			c, err := dial(dir, e.Name())
			if err != nil {
				return nil, err
			}
			if c != nil {
				cs = append(cs, c)
			}
		}
	}
	return cs, nil
}

// dial returns nil where nobody listens.
func dial(dir, name string) (*Client, error) {
	path := filepath.Join(dir, name)
	if _, err := os.Lstat(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, fs.ErrPermission) {
			return nil, nil
		}
		return nil, err
	}
	if err := checkDir(dir, os.Getuid()); err != nil {
		return nil, err
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	alive, err := probe(path)
	unlock()
	if err != nil || !alive {
		return nil, err
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", path)
		},
	}}}, nil
}

// Status fills v with the mount's status.
func (c *Client) Status(ctx context.Context, v any) error { return c.do(ctx, "GET", "/status", v) }

// Sync returns once the remote has what was written; v is filled with the
// mount's summary.
func (c *Client) Sync(ctx context.Context, v any) error { return c.do(ctx, "POST", "/sync", v) }

// Unmount returns once the mount is gone, and its socket too; v is filled with
// its summary.
func (c *Client) Unmount(ctx context.Context, v any) error {
	if err := c.do(ctx, "POST", "/unmount", v); err != nil {
		return err
	}
	return c.gone(ctx)
}

// How long, and how often, to look whether a process that has unmounted takes
// its socket away. It has nothing to do any more that takes time.
const (
	goneTimeout = 5 * time.Second
	gonePause   = 5 * time.Millisecond
)

func (c *Client) gone(ctx context.Context) error {
	limit := time.After(goneTimeout)
	tick := time.NewTicker(gonePause)
	defer tick.Stop()
	for {
		if _, err := os.Lstat(c.path); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		select {
		case <-tick.C:
		case <-limit:
			return nil // it is unmounted all the same
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (c *Client) do(ctx context.Context, method, path string, v any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://mount"+path, http.NoBody)
	if err != nil {
		return err
	}
	res, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("the mount's process did not answer: %w", unwrapURL(err))
	}
	defer res.Body.Close()
	dec := json.NewDecoder(io.LimitReader(res.Body, maxAnswer))
	if res.StatusCode != http.StatusOK {
		var f failure
		if err := dec.Decode(&f); err != nil || f.Error == "" {
			return fmt.Errorf("the mount's process answered %s", res.Status)
		}
		return &RemoteError{f.Error, f.Busy}
	}
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("the mount's answer: %w", err)
	}
	return nil
}

// RemoteError is what the mount's process said went wrong.
type RemoteError struct {
	Text string
	Busy bool
}

func (e *RemoteError) Error() string { return e.Text }

// Is makes a busy mount match [memferry.ErrInUse].
func (e *RemoteError) Is(target error) bool { return e.Busy && target == memferry.ErrInUse }

// unwrapURL drops the made-up URL that net/http puts before an error.
func unwrapURL(err error) error {
	if u := errors.Unwrap(err); u != nil {
		return u
	}
	return err
}

func isRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
