//go:build race

package testenv

// Race tells that the race detector is on: tests do fewer rounds then.
const Race = true
