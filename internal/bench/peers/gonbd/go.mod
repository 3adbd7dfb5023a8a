module github.com/memferry/memferry/internal/bench/peers/gonbd

go 1.26.0

require github.com/pojntfx/go-nbd v0.3.2
