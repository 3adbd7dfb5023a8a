package gate

import (
	"sync"
	"sync/atomic"
	"testing"
)

func TestGate(t *testing.T) {
	var g Gate
	for range 2 {
		if !g.Enter() || g.Closed() {
			t.Fatal("a new gate is not open")
		}
	}
	if !g.Shut() || g.Shut() {
		t.Fatal("Shut must report true the first time alone")
	}
	if g.Enter() || !g.Closed() {
		t.Fatal("a shut gate let somebody in")
	}
	g.Leave()
	select {
	case <-g.Idle():
		t.Fatal("idle with somebody inside")
	default:
	}
	g.Leave()
	<-g.Idle()
	if g.Enter() {
		t.Fatal("a shut gate let somebody in")
	}
}

func TestGateEmpty(t *testing.T) {
	var g Gate
	g.Shut()
	<-g.Idle()
}

// Nobody is inside once Idle fires.
func TestGateConcurrent(t *testing.T) {
	for range 200 {
		var g Gate
		var released atomic.Bool
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for g.Enter() {
					if released.Load() {
						t.Error("inside after idle")
					}
					g.Leave()
				}
			})
		}
		g.Shut()
		<-g.Idle()
		released.Store(true)
		wg.Wait()
	}
}
