package main

import (
	"strings"
	"testing"
)

func TestPrinter(t *testing.T) {
	const in = `{"Action":"start","Package":"github.com/memferry/memferry/nbd"}
{"Action":"run","Package":"github.com/memferry/memferry/nbd","Test":"TestA"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestA","Output":"chatter of a test that passes\n"}
{"Action":"pass","Package":"github.com/memferry/memferry/nbd","Test":"TestA"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestB","Output":"=== RUN   TestB\n"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestB","Output":"    b_test.go:7: needs nbdinfo: run scripts/install-test-deps\n"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestB","Output":"--- SKIP: TestB (0.00s)\n"}
{"Action":"skip","Package":"github.com/memferry/memferry/nbd","Test":"TestB"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestC","Output":"=== RUN   TestC\n"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestC","Output":"--- FAIL: TestC (0.00s)\n"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestC","Output":"    c_test.go:9: wrong bytes\n"}
{"Action":"fail","Package":"github.com/memferry/memferry/nbd","Test":"TestC"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Test":"TestD","Output":"panic: test timed out\n"}
{"Action":"output","Package":"github.com/memferry/memferry/nbd","Output":"FAIL\tgithub.com/memferry/memferry/nbd\t0.01s\n"}
{"Action":"fail","Package":"github.com/memferry/memferry/nbd"}
{"ImportPath":"x","Action":"build-output","Output":"x.go:1:1: syntax error\n"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
go: plain words
`
	const want = `--- FAIL: TestC (0.00s)
    c_test.go:9: wrong bytes
FAIL	github.com/memferry/memferry/nbd	0.01s
panic: test timed out
x.go:1:1: syntax error
ok  	p	0.1s
go: plain words

skipped:
  ./nbd TestB: needs nbdinfo: run scripts/install-test-deps

1 passed, 1 failed, 1 skipped
`
	var b strings.Builder
	p := newPrinter(&b)
	p.read(strings.NewReader(in))
	p.summary()
	if b.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", b.String(), want)
	}
}

func TestReasonWithoutWords(t *testing.T) {
	if got := reason([]string{"=== RUN   TestX\n", "--- SKIP: TestX (0.00s)\n"}); got != "no reason given" {
		t.Errorf("reason = %q", got)
	}
}
