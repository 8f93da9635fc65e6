# Every target first sees to it that the tools it takes are there (tools/setup/deps.sh); "make help" lists them all.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PATH := $(CURDIR)/.tools/bin:$(PATH)

DEPS    := tools/setup/deps.sh
GOBUILD := CGO_ENABLED=0 go build -trimpath
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
PURE    := $(addprefix ./internal/,ima policy event imalog binding verify)
KERNEL  ?=
RUN     ?=
SHORT   ?=
AGAIN   ?=
RACE    ?= 1
# Where nothing may be left out, the race detector is not, either.
RACED   := $(if $(IMANS_REQUIRE_VM),1,$(filter-out 0,$(RACE)))
VMFLAGS  = $(if $(SHORT),-short) $(if $(AGAIN),-again) $(if $(RUN),-run '$(RUN)') $(if $(KERNEL),-kernel '$(KERNEL)') $(if $(COVER),-cover '$(COVER)')

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the static agent as bin/imans-agent
	@$(DEPS) go
	$(GOBUILD) -ldflags '-X main.version=$(VERSION)' -o bin/imans-agent ./cmd/imans-agent

.PHONY: generate
generate: ## compile bpf/ and make the generated Go, C and documentation files anew
	@$(DEPS) go generate
	go run ./tools/bpf2go

.PHONY: generated
generated: ## check that the committed generated files are current
	@$(DEPS) go
	tools/setup/generated.sh

.PHONY: lint
lint: ## check format, vet, staticcheck, the import layers and the shell scripts
	@$(DEPS) go lint
	@test -z "$$(gofmt -l .)" || { echo "not formatted; run gofmt -w on:"; gofmt -l .; exit 1; } >&2
	go vet -tags vm ./...
	go vet -tags faults ./internal/fault
	for target in darwin/arm64 windows/amd64 linux/arm; do \
	  export GOOS=$${target%/*} GOARCH=$${target#*/}; go build $(PURE); go vet $(PURE); done
	go tool staticcheck -tags vm ./...
	go run ./tools/layers
	@if type -P shellcheck >/dev/null; then shellcheck .ci/run $$(git ls-files '*.sh'); else echo "no shellcheck: scripts not checked"; fi

.PHONY: test
test: lint test-unit generated ## run every check: lint, unit tests, generated files, fuzzing, all kernels
	@$(MAKE) fuzz FUZZTIME=2000x OWN=1
	@$(MAKE) test-vm SHORT=1 AGAIN=1 LIMIT=45m

.PHONY: test-unit
test-unit: ## run the unit tests with the race detector (RUN=regexp PKG=./… RACE=0 where there is no gcc)
	@$(DEPS) go test $(if $(RACED),race) $(if $(IMANS_REQUIRE_VM),vm)
	CGO_ENABLED=$(if $(RACED),1,0) go test $(if $(RACED),-race) $(if $(RUN),-run '$(RUN)') $(or $(PKG),./...)

.PHONY: fuzz
fuzz: ## give every decoder random input, FUZZTIME each (10s, or a number of inputs as 2000x; FUZZ=regexp of the targets, OWN=1 compiles less)
	@$(DEPS) go test
	tools/setup/fuzz.sh $(or $(FUZZTIME),10s) '$(or $(FUZZ),.)' $(if $(OWN),own)

.PHONY: test-vm
test-vm: ## run the tests of the vm tag on stock kernels (RUN=regexp KERNEL=6.12 COVER=file SHORT=1 AGAIN=1 LIMIT=1h)
	@$(DEPS) go vm
	go build -o bin/vmtest ./test/vm/cmd/vmtest
	exec bin/vmtest -timeout $(or $(LIMIT),1h) $(VMFLAGS)

.PHONY: soak
soak: ## run the tests of the vm tag with far more work (RUN=, KERNEL=)
	@$(DEPS) go vm
	go build -o bin/vmtest ./test/vm/cmd/vmtest
	exec bin/vmtest -soak -timeout 3h $(VMFLAGS)

.PHONY: demo
demo: ## boot a kernel with a TPM, measure two containers and verify their lists
	@$(DEPS) go vm
	go build -o bin/demo ./test/vm/cmd/demo
	exec bin/demo

.PHONY: bench
bench: ## print what the agent costs, as ratios with their spread (ONLY="exec clone hash extend memory replay vtpm latency gate")
	@$(DEPS) go vm test
	go build -o bin/bench ./test/vm/cmd/bench
	exec bin/bench $(ONLY)

.PHONY: clean
clean: ## remove what was built in this folder
	rm -rf bin .tools

.PHONY: clean-vm
clean-vm: ## remove the kernels and disks that the virtual machines' cache keeps
	@$(DEPS) go
	go run ./test/vm/cmd/vmrun -clear
