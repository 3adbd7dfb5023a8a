# Every target works from a fresh clone. `make help` lists them.

GO       ?= go
# Packages that mount file systems run side by side without trouble; more than
# two at once only measure the scheduler.
TESTFLAGS ?= -p 2 -timeout 20m
PKG      ?= ./...
FUZZTIME ?= 10s
BENCH    ?= all
BENCHFLAGS ?=
# What test-vm runs, and how long one package may take there.
VMPKG    ?= ./internal/vm
VMTIMEOUT ?= 12m

export CGO_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help build demo test test-deps test-vm vm-shell race fuzz lint bench cover clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PKG=./nbd/... narrows test, race and cover; TESTFLAGS=-short skips the long tests."

build: ## build bin/memferry
	$(GO) build -trimpath -o bin/memferry ./cmd/memferry

demo: ## run the demo
	$(GO) run ./cmd/memferry demo

test: test-deps ## run all tests (installs what they need from Debian when run as root)
	$(GO) run ./internal/gotest $(TESTFLAGS) $(PKG)

test-deps:
	@scripts/install-test-deps --quiet

test-vm: test-deps ## run the tests that need nbd or ublk in a virtual machine; PKG=... RUN=REGEXP narrows
	@$(GO) build -o bin/vm ./internal/vm/cmd
	@bin/vm prepare
	$(GO) run ./internal/gotest -exec $(CURDIR)/bin/vm\ run -p 1 -count=1 -timeout $(VMTIMEOUT) \
		-run '$(or $(RUN),.)' $(if $(filter file,$(origin PKG)),$(VMPKG),$(PKG))

vm-shell: test-deps ## a shell in that machine (leave it with exit)
	@$(GO) build -o bin/vm ./internal/vm/cmd
	@bin/vm shell

race: ## run the tests under the race detector (needs a C compiler)
	CGO_ENABLED=1 $(GO) run ./internal/gotest -race -short $(TESTFLAGS) $(PKG)

fuzz: ## run every fuzz target for FUZZTIME each
	@scripts/fuzz $(FUZZTIME)

lint: ## run go vet, golangci-lint (pinned, built on first use) and shellcheck
	$(GO) vet ./...
	@scripts/golangci-lint run
	@scripts/shellcheck

bench: test-deps ## benchmark beside other programs; BENCH=nbd,fuse,... BENCHFLAGS=-quick
	$(GO) run ./internal/bench/cmd -run $(BENCH) $(BENCHFLAGS)

cover: ## write coverage.out and print the total
	$(GO) run ./internal/gotest $(TESTFLAGS) -coverprofile=coverage.out -coverpkg=./... $(PKG)
	$(GO) tool cover -func=coverage.out | tail -n 1

clean: ## remove what the other targets made
	rm -rf bin coverage.out
