package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/memferry/memferry"
)

// Mount is what a [Server] speaks for. The values returned are encoded as
// JSON. An error's text goes to the client, which prints it as it is.
type Mount interface {
	Status() any
	Sync(ctx context.Context) (any, error)
	Unmount(ctx context.Context) (any, error)
}

// Limits of the server: its clients are the same user's, but a stuck one must
// not keep the mount from ending.
const (
	headerTimeout = 10 * time.Second
	dialTimeout   = 2 * time.Second
	maxHeader     = 16 << 10
)

// Server answers on the socket of one mount.
type Server struct {
	path string
	l    net.Listener
	http *http.Server
	done chan struct{}
}

// Listen creates the socket of the mount at the absolute path mountpoint, in
// the first of dirs that can be used, and serves m on it. A socket that a dead
// process left is replaced; a living one is [memferry.ErrInUse].
func Listen(dirs []string, mountpoint string, m Mount) (*Server, error) {
	dir, err := makeDir(dirs, os.Getuid())
	if err != nil {
		return nil, err
	}
	l, path, err := listen(dir, mountpoint)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	s := &Server{
		path: path,
		l:    l,
		http: &http.Server{
			Handler:           handler(m),
			ReadHeaderTimeout: headerTimeout,
			MaxHeaderBytes:    maxHeader,
		},
		done: make(chan struct{}),
	}
	go func() {
		defer close(s.done)
		_ = s.http.Serve(l) // ends with ErrServerClosed; nobody could act on others
	}()
	return s, nil
}

func listen(dir, mountpoint string) (net.Listener, string, error) {
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, "", err
	}
	defer unlock()
	path := filepath.Join(dir, socketName(mountpoint))
	if alive, err := probe(path); err != nil {
		return nil, "", err
	} else if alive {
		return nil, "", fmt.Errorf("%s is mounted by another memferry: %w", mountpoint, memferry.ErrInUse)
	}
	l, err := net.Listen("unix", path)
	return l, path, err
}

// probe reports whether somebody listens on path, and removes a dead socket.
func probe(path string) (bool, error) {
	c, err := net.DialTimeout("unix", path, dialTimeout)
	switch {
	case err == nil:
		c.Close()
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case isRefused(err):
		return false, os.Remove(path)
	}
	// Full backlog, or a timeout: somebody is there.
	return true, nil
}

// Path is that of the socket.
func (s *Server) Path() string { return s.path }

// Close lets requests under way finish, as long as ctx allows, and removes the
// socket.
func (s *Server) Close(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.http.Close())
	}
	<-s.done
	return err
}

func handler(m Mount) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, m.Status(), nil)
	})
	mux.HandleFunc("POST /sync", func(w http.ResponseWriter, r *http.Request) {
		v, err := m.Sync(r.Context())
		reply(w, v, err)
	})
	mux.HandleFunc("POST /unmount", func(w http.ResponseWriter, r *http.Request) {
		v, err := m.Unmount(r.Context())
		reply(w, v, err)
	})
	return mux
}

// failure is the body of an answer that is no success.
type failure struct {
	Error string `json:"error"`
	Busy  bool   `json:"busy,omitempty"`
}

func reply(w http.ResponseWriter, v any, err error) {
	status := http.StatusOK
	if err != nil {
		status = http.StatusInternalServerError
		v = failure{Error: err.Error(), Busy: errors.Is(err, memferry.ErrInUse)}
	}
	body, err := json.Marshal(v)
	if err != nil {
		http.Error(w, `{"error":"encode the answer"}`, http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a client that left needs no answer
}
