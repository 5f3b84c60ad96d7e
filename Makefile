# What people type. Everything that is needed is installed by deploy/install-deps, and nothing if it is there.

CARGO ?= cargo
PROGRAM = $(or $(CARGO_TARGET_DIR),target)/release/collective
export CARGO_TERM_COLOR ?= auto

.PHONY: demo demo-stop test soak fuzz lint install bench bench-store bench-machine

demo:            ## the main job on a real Debian appliance
	deploy/install-deps demo
	$(CARGO) build --release --bin collective
	deploy/demo $(PROGRAM)

demo-stop:       ## ends what `make demo` left running and removes it
	deploy/demo-stop $(PROGRAM)

test: lint       ## everything that is tested, with real QEMU
	deploy/install-deps test
	$(CARGO) test --workspace -- --test-threads 2

soak:            ## what takes hours: a plain Debian with cloud-init, bad luck at many instants; SOAK=N, SEEDS=N for more
	deploy/install-deps test
	$(CARGO) test --workspace --test stories -- --ignored --test-threads 1

# Sanitizers are not stable yet; the variable lets the stable compiler use them. What is found goes below fuzz/artifacts,
# and belongs into fuzz/corpus once it is understood.
FUZZ ?= 60
fuzz:            ## looks for bytes that break a format, FUZZ seconds for each; needs cargo-fuzz and a C++ compiler
	cd fuzz && for target in $$($(CARGO) fuzz list); do \
	  mkdir -p target/found/$$target && \
	  RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --dev $$target target/found/$$target corpus/$$target -- \
	    -max_total_time=$(FUZZ) -timeout=20 -max_len=65536 || exit 1; \
	done

lint:            ## format and clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

bench: bench-store bench-machine

bench-store:     ## the store against its peers, some 25 minutes, as root; results in target/bench/store.{json,md,svg}
	deploy/install-deps bench
	$(CARGO) build --release --bin collective
	bench/store/run $(PROGRAM)

bench-machine:   ## a running machine as data, some 25 minutes, as root; results in target/bench/machine.{json,md,svg}
	deploy/install-deps bench
	$(CARGO) build --release --bin collective
	bench/machine/run $(PROGRAM)

install:         ## the program into /usr/local/bin
	$(CARGO) build --release --bin collective
	install -m 755 $(PROGRAM) /usr/local/bin/collective
