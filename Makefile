# Steadfast. `make` lists what there is.
#
# Everything works as root or with sudo, which is asked for only where files of many users are handled
# (templates) or packages are installed. Nothing is written outside this folder except by `install`, by
# the package manager, and by `demo` into stead's data directory.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PREFIX ?= /usr/local
DESTDIR ?=
# How long `make soak` and `make fuzz` go on, in minutes.
MINUTES ?= 60
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo --preserve-env=STEAD_TEMPLATE_CACHE,STEAD_DATA_DIR)

# Installed packages are kept here and shared by all templates built in this tree.
export STEAD_TEMPLATE_CACHE ?= $(CURDIR)/target/template-cache
# A guest takes a core and half a gigabyte, and a test waits for its guest for a part of its time: one test more than
# cores, and never more than four, which would only slow each other down.
export RUST_TEST_THREADS ?= $(shell n=$$(nproc); echo $$(( n < 4 ? n + 1 : 4 )))

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: setup
setup: ## install what building and running needs
	@scripts/setup run

.PHONY: build
build: setup agent ## build stead and the guest agent, optimised
	cargo build --release --package stead-cli

.PHONY: agent
agent: ## build the static guest agent
	@scripts/build-agent

.PHONY: demo
demo: build ## the whole path on a real Debian VM, every claim checked
	$(AS_ROOT) target/release/stead demo

.PHONY: setup-dev
setup-dev:
	@scripts/setup dev

.PHONY: test
test: setup-dev agent ## all tests, with real QEMU guests; a summary at the end
	cargo build --package stead-cli --features stead-engine/crash-points
	@scripts/test

.PHONY: check
check: ## formatting, lints, documentation, dependencies and their licences
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps
	scripts/check-dependencies
	scripts/check-guarantees
	@scripts/setup check
	cargo deny --log-level error check bans licenses sources
	cargo deny --manifest-path fuzz/Cargo.toml --log-level error check bans licenses sources

.PHONY: bench
bench: setup-dev build ## measure Steadfast beside QEMU's own means
	cargo build --release --package stead-bench
	$(AS_ROOT) target/release/stead-bench --out BENCHMARKS.md

.PHONY: soak
soak: setup-dev agent ## the tests again and again, with new random cases, for MINUTES=60
	cargo build --package stead-cli --features stead-engine/crash-points
	@scripts/soak $(MINUTES)

.PHONY: fuzz
fuzz: ## coverage-guided fuzzing of all that reads or changes untrusted bytes, for MINUTES=60
	@scripts/setup fuzz
	@scripts/fuzz $(MINUTES)

.PHONY: install
install: build ## build, and install under PREFIX=/usr/local, with completion and manual pages
	$(AS_ROOT) scripts/install target/release/stead target/x86_64-unknown-linux-gnu/agent/stead-agent $(DESTDIR)$(PREFIX)
