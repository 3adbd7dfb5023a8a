module github.com/memferry/memferry/internal/bench/peers/userfaultfdgo

go 1.26.0

require github.com/loopholelabs/userfaultfd-go v0.1.2

require golang.org/x/sys v0.21.0 // indirect
