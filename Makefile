# `make demo` and `make test` are all the set-up a fresh Debian or Ubuntu with
# Rust needs: they install what is missing and say what they do.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test soak bench lint man clean-cache

SETUP := tests/setup
INSTALL := $(SETUP)/install.sh

# Every script and test agrees on one place.
export HIGHWATER_TEST_CACHE := $(shell $(INSTALL) --cache)
export HIGHWATER_PG_ROOT := $(HIGHWATER_TEST_CACHE)/pg
# End-to-end tests wait more than they compute; how many of them run servers at once they see to themselves.
export RUST_TEST_THREADS ?= $(shell n=$$(nproc); echo $$((n > 3 ? n : 3)))
# Where tests say that this system forbids what they need.
export HIGHWATER_TEST_NOT_RUN := $(HIGHWATER_TEST_CACHE)/not-run

help: ## list these targets
	@sed -nE 's/^([a-z-]+):.*## /\1	/p' $(MAKEFILE_LIST) \
		| while IFS='	' read -r target text; do printf 'make %-13s %s\n' "$$target" "$$text"; done

demo: ## the main job in less than a minute: archive, back up, drop a table, go back to just before
	@$(INSTALL) --demo
	@$(SETUP)/demo.sh

test: ## every test, against real PostgreSQL 14 to 18 and real object stores
	@$(INSTALL) --test
	@rm -f $(HIGHWATER_TEST_NOT_RUN)
	cargo test --no-fail-fast; status=$$?; \
	if [ -s $(HIGHWATER_TEST_NOT_RUN) ]; then \
		echo; echo "Not run on this system:"; sort -u $(HIGHWATER_TEST_NOT_RUN); \
	fi; exit $$status

soak: ## the tests that kill things at random moments, 50 rounds each, and a chain of 30 backups
	@$(INSTALL) --test
	HIGHWATER_SOAK_ROUNDS=$${HIGHWATER_SOAK_ROUNDS:-50} cargo test --no-fail-fast --test suite -- kills:: fire:: receive_resume::a_killed copy_beside_expire:: agent::archiving_goes_on agent::an_agent_that_was_killed expire:: memory::very_many log::log_tells drill::a_drill_killed power_cut:: --nocapture
	HIGHWATER_SOAK_ROUNDS=$${HIGHWATER_SOAK_ROUNDS:-50} cargo test --lib -- trials::verify::a_bit_flipped_anywhere
	HIGHWATER_SOAK_ROUNDS=$${HIGHWATER_SOAK_ROUNDS:-50} cargo test --lib -- walsender::wire walsender::wal_stream

bench: ## speed and memory beside cp, pg_basebackup, pgBackRest and Barman
	@$(INSTALL) --bench
	cargo build --release
	benches/run.sh

lint: ## formatting, clippy, documentation, licences, shell scripts, container files
	@$(INSTALL) --lint
	@$(SETUP)/lint.sh

man: ## the manual pages, into target/man
	@mkdir -p target/man
	cargo run --quiet -- man target/man

clean-cache: ## remove what make demo, make test and make lint put into the cache
	@cache=$$($(INSTALL) --cache) && echo "removing $$cache" && rm -rf "$$cache"
