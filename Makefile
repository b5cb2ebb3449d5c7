# minivmm's commands. `make run` and `make test` need nothing but Debian and Rust: they install what
# is missing, or print the line that does.

.DEFAULT_GOAL := help
.PHONY: help build run check test test-intel bench bench-bare bench-export bench-guest bench-modes bench-sandbox study lint deps test-deps clean torture fuzz fuzz-merge fuzz-coverage asan miri install install-files static deb

include guest-images/guest.mk

help: ## lists the commands
	@echo "make run          boots a test guest with a disk in cache=none, runs fio in it, tells what happened"
	@echo "make check        what to run before each commit: formatting, clippy, unit tests, the device's suites"
	@echo "make test         every check: lint, device, images, real kernels"
	@echo "make bench        the device path beside fio on this machine: QUICK=1, ROUNDS=, SECONDS=, ONLY=, FULL=1"
	@echo "make bench-bare   a guest of our own beside QEMU's on this machine's KVM: QUICK=1, ROUNDS=, ONLY="
	@echo "make bench-export  \`minivmm export\` beside qemu-storage-daemon, one front end: QUICK=1, ROUNDS=, SECONDS=, ONLY=, DRIVER="
	@echo "make bench-sandbox  what each thread's filter adds to a system call: QUICK=1, ROUNDS="
	@echo "make bench-guest  fio in the test guest under minivmm and QEMU, boots to init: QUICK=1, ROUNDS=, ONLY=, WHO=, MODES="
	@echo "make bench-modes  \`minivmm bench\`, here or in the emulated host: MODES=, JOBS=, ONLY=, ROUNDS=, SECONDS=, SIZE=, ARGS="
	@echo "make study        what was said of disk caching in 2008, measured, as a page: QUICK=1, OUT=study, ONLY=, ROUNDS="
	@echo "make lint         formatting, clippy, licences and sources of the dependencies, shell scripts"
	@echo "make build        target/release/minivmm, and minivmm-tools and minivmm-export, which must stay beside it"
	@echo "make guest        the test guest's kernel and initramfs, in guest-images/build"
	@echo "make guest-small  a small kernel of our own, with virtio built in"
	@echo "make emuhost      the emulated host, for machines whose KVM cannot run Linux"
	@echo "make install      the binaries, manual, completions, docs, guest images; PREFIX=/usr/local, DESTDIR="
	@echo "make static       a static binary, for any Linux: $(static_binary)"
	@echo "make deb          a Debian package of it, in target/debian"
	@echo "make test-intel   minivmm under kvm_intel on emulated processors of Intel's: check and four boots each, MODELS="
	@echo "make torture      the long suites"
	@echo "make fuzz         the fuzzers in turn: TARGET=, SECONDS= for each; make fuzz-merge keeps what is new,"
	@echo "                  make fuzz-coverage counts lines"
	@echo "make asan         the device's suites with AddressSanitizer"
	@echo "make miri         the unsafe code over guest memory under Miri, where a nightly has it"
	@echo "make clean        removes what was built"

# Three binaries: minivmm execs, in its own directory, minivmm-tools for top, log, crash, bench and study, and
# minivmm-export for export.
build:
	@cargo build --release --locked

# Debian's packages that the rest needs: what is missing is installed, by root or with sudo.
PACKAGES := gcc make libc6-dev xz-utils zstd bzip2 cpio e2fsprogs strace fio openssh-client python3 \
	lz4 flex bison bc libelf-dev shellcheck tmux acpica-tools procps psmisc

# What only the tests need: the peer that the auditor, --explain and export are compared with (its storage daemon is in
# qemu-system-common or qemu-utils), what counts instructions, the database that a loss of power is tried on, what makes
# deliberate mistakes, and the firmware and boot loaders that boot from an exported disk.
TEST_PACKAGES := qemu-system-x86 qemu-system-common qemu-utils valgrind sqlite3 patch xfsprogs \
	seabios ovmf grub-common grub-pc-bin grub-efi-amd64-bin mtools

deps:
	@guest-images/install-packages $(PACKAGES)

test-deps: deps
	@guest-images/install-packages $(TEST_PACKAGES)

# Boots `minivmm --disk disk.img,cache=none`, here or in the emulated host.
run: deps build guest
	@guest-images/demo

# What was skipped is told in one list at the end. MINIVMM_REQUIRE=kvm,root,kernel,... makes a failure of each skip
# for want of that (CONTRIBUTING.md).
export MINIVMM_SKIPS := $(CURDIR)/target/skipped
test: test-deps lint build guest-all guest-small
	@echo "Guests with a kernel run $$(guest-images/which-host)."
	@mkdir -p target; rm -f $(MINIVMM_SKIPS); : > $(MINIVMM_SKIPS); chmod a+w $(MINIVMM_SKIPS)
	@case ,$(MINIVMM_REQUIRE), in *,kernel,*) [ -r /dev/kvm ] || \
		{ echo "make test: error: MINIVMM_REQUIRE has kernel, and no Linux guest runs here" >&2; exit 1; } ;; esac
	@cargo test --release --locked
	@for keys in $(ENGINES); do \
		echo "The device's suites with $$keys."; \
		MINIVMM_KEYS=$$keys cargo test --release --locked --quiet $(DEVICE_SUITES) || exit 1; \
	done
	@echo "The suites without a kernel over virtio-pci."
	@MINIVMM_TRANSPORT=pci cargo test --release --locked --quiet $(PCI_SUITES)
	@cargo test --release --locked -p minivmm-block --features observed --test durability --test fences
	@case $$(guest-images/which-host) in \
		directly*) kernels="guests:job:: guests:kernel::" ;; \
		*) kernels="guests:job::arguments_environment guests:kernel::power_off" ;; \
	esac; [ "$$(id -u)" -ne 0 ] || tests/as-user $(USER_SUITES) $$kernels
	@tests/as-user --userns $(USERNS_SUITES)
	@[ ! -s $(MINIVMM_SKIPS) ] || { echo "Not everything ran here:"; sort -u $(MINIVMM_SKIPS); }

# Two minutes from a warm build, without a kernel or a guest.
check:
	@cargo fmt --all -- --check
	@cargo clippy --release --locked --workspace --all-targets --features minivmm-block/observed --quiet -- -D warnings
	@cargo test --release --locked --quiet --lib --test tidy --test mutants
	@cargo test --release --locked --quiet $(DEVICE_SUITES) disk_queue::

# Once more as an ordinary user who has /dev/kvm and files of its own alone, and as root of a user namespace: what works
# only as root fails there. An ordinary user who runs `make test` has had the first of the two already. Where
# kernels take long because the host is emulated, one test of each suite with kernels runs.
USER_SUITES := bare program:sandbox:: program:check:: program:dontcache:: program:hosts:: vhost_user:drivers:: \
	vhost_user:modes::linux_6_12
USERNS_SUITES := bare program:sandbox::

# A suite is a module of a test program: the words after -- choose tests by their names. These run once with the
# defaults, and once with each engine and each way in which writes are made stable.
ENGINES := $(foreach engine,io_uring sync,$(foreach stable,dsync fdatasync group auto,engine=$(engine),stable=$(stable))) \
	engine=io_uring,buffers=fixed engine=io_uring,poll-us=0
DEVICE_SUITES := --test device --test program --test transports -- \
	blk:: disk:: device:: drivers:: log:: reset:: rings:: transport::
# Those that reach the device through registers; `transport` is about virtio-mmio's own, `pci` about PCI's.
PCI_SUITES := --test device --test program --test transports -- \
	blk:: disk:: device:: drivers:: reset:: rings:: malformed:: console::

# Measures and compares, asserts nothing (docs/performance.md). As root it counts system calls as well.
bench_arguments = $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS)) \
	$(if $(ONLY),--only $(ONLY)) $(if $(DRIVER),--driver $(DRIVER)) $(if $(FULL),--full) \
	$(if $(QUICK),--quick) $(ARGS)
bench: deps
	@cargo bench --quiet --locked --bench device -- $(bench_arguments)

# A guest without a kernel on real KVM, under minivmm and QEMU in turn: a quarter of an hour.
bench-bare: test-deps
	@cargo bench --quiet --locked --bench bare -- $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(QUICK),--quick) $(ARGS)

# `minivmm export` beside qemu-storage-daemon under the same front end: two to three minutes.
bench-export: test-deps build
	@cargo bench --quiet --locked --bench export -- $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(ONLY),--only $(ONLY)) $(if $(DRIVER),--driver $(DRIVER)) $(if $(QUICK),--quick) $(ARGS)

# What each thread's filter adds to a system call: seconds.
bench-sandbox:
	@cargo bench --quiet --locked --bench sandbox -- $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(QUICK),--quick) $(ARGS)

# What a guest sees, with a kernel: some seconds a job, and hours of boots where the host is emulated.
bench-guest: test-deps build guest
	@cargo bench --quiet --locked --bench guest -- $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(ONLY),--only $(ONLY)) $(if $(WHO),--who $(WHO)) $(if $(MODES),--modes $(MODES)) $(if $(QUICK),--quick) $(ARGS)

# `minivmm bench` on an image of its own; the report as JSON is target/bench/modes.json.
bench-modes: deps build guest
	@MODES='$(MODES)' JOBS='$(JOBS)' ONLY='$(ONLY)' ROUNDS='$(ROUNDS)' SECONDS_EACH='$(SECONDS)' SIZE='$(SIZE)' \
		guest-images/bench-modes $(ARGS)

# The claims of 2008 as experiments (docs/study.md): ten minutes with QUICK=1, else an hour or more. Here, or in the
# emulated host.
study: deps build guest
	@case $$(guest-images/which-host) in directly*) ;; *) $(MAKE) --no-print-directory emuhost ;; esac
	@QUICK="$(QUICK)" OUT="$(OUT)" ONLY="$(ONLY)" ROUNDS="$(ROUNDS)" guest-images/study

# The long suites: every combination of killed hosts and lost power TRIALS times (five minutes each), the same
# with QEMU, exports and their front ends killed a hundred times each, hundreds of times as many seeds of the durability
# proof, each deliberate mistake of tests/mutants built and found; half an hour of soak on this machine's KVM, and five
# minutes of it in the emulated host (SOAK= seconds, in place of either); emulated Intel hosts.
torture: test-deps build guest-all emuhost
	@MINIVMM_TRIALS=$(or $(TRIALS),10) MINIVMM_BESIDE_QEMU=1 cargo test --release --locked --test endurance -- killed:: --nocapture --test-threads 1
	@MINIVMM_SEEDS=$(or $(SEEDS),5000000) cargo test --release --locked -p minivmm-block --features observed --test durability -- --nocapture
	@MINIVMM_REQUESTS=2 cargo test --release --locked -p minivmm-block --features observed --test fences -- --nocapture
	@MINIVMM_MUTANTS=all cargo test --release --locked --test mutants -- --nocapture
	@MINIVMM_TRIALS=$(or $(TRIALS),100) cargo test --release --locked --test vhost_user -- --nocapture
	@MINIVMM_DONTCACHE_MIB=1024 cargo test --release --locked --test program -- dontcache:: --nocapture
	@case $$(guest-images/which-host) in directly*) \
		MINIVMM_SOAK_SECONDS=$(or $(SOAK),1800) cargo test --release --locked --test endurance -- soak:: --nocapture ;; esac
	@MINIVMM_HOST=emulated MINIVMM_SOAK_SECONDS=$(or $(SOAK),300) cargo test --release --locked --test endurance -- soak:: --nocapture
	@$(MAKE) --no-print-directory test-intel

# A smoke test under kvm_intel wherever this runs: Bochs emulates the processors (CONTRIBUTING.md).
test-intel: deps build guest-small emuhost-intel
	@guest-images/test-intel $(MODELS)

# libFuzzer with AddressSanitizer on what guests and files say (docs/fuzzing.md); coverage needs an llvm-cov of
# the compiler's LLVM.
fuzz fuzz-merge:
	@guest-images/install-packages gcc g++ libc6-dev
	@SECONDS_EACH=$(or $(SECONDS),60) fuzz/run $(if $(filter fuzz,$@),fuzz,merge) $(TARGET)

fuzz-coverage:
	@guest-images/install-packages llvm-$$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
	@fuzz/run coverage $(TARGET)

# The suites of the device with AddressSanitizer, io_uring included.
asan: deps
	@fuzz/run asan

# The unsafe code over guest memory under Miri, where a nightly toolchain with that component is installed.
miri:
	@cargo +nightly miri --version >/dev/null 2>&1 || \
		{ echo "make miri: error: no Miri here: rustup toolchain install nightly --component miri rust-src" >&2; exit 1; }
	@MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --locked --test unsafe_memory

lint: deps
	@cargo fmt --all -- --check
	@cargo clippy --release --locked --workspace --all-targets --features minivmm-block/observed --quiet -- -D warnings
	@shellcheck --external-sources --source-path=SCRIPTDIR guest-images/which-host guest-images/demo guest-images/bench-modes guest-images/study \
		guest-images/install-packages guest-images/emuhost guest-images/boot-times guest-images/build-guest \
		guest-images/build-host guest-images/build-small-kernel guest-images/build-intel-host guest-images/test-intel \
		guest-images/intel/init guest-images/intel/guest-init guest-images/freestanding/build.sh guest-images/pack-qemu .ci/run \
		guest-images/guest/init guest-images/guest/minivmm-* guest-images/host/* \
		tests/as-user fuzz/run examples/crash/*.sh examples/crash/*/*.sh
	@command -v cargo-deny >/dev/null || cargo install --quiet --debug --locked cargo-deny
	@cargo deny --log-level error check bans licenses sources

# What is installed. Everything is built before, as the user, and then only copied: `make build guest`
# and `sudo make install` does as well as either alone.
PREFIX ?= /usr/local
DESTDIR ?=
installed := $(DESTDIR)$(PREFIX)
binary := target/release/minivmm
static_binary := target/x86_64-unknown-linux-gnu/release/minivmm
sources := $(shell find src crates -name '*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock
manual := target/manual

$(binary): $(sources)
	@cargo build --release --locked
	@touch $@

$(static_binary): $(sources)
	@RUSTFLAGS='-C target-feature=+crt-static' \
		cargo build --release --locked --target x86_64-unknown-linux-gnu
	@touch $@

$(manual)/minivmm.1: $(sources)
	@cargo run --locked --quiet --package minivmm-lab --example manual -- $(manual)
	@touch $@

$(guest_build)/vmlinuz:
	@$(MAKE) --no-print-directory guest

static: $(static_binary)
	@file -b $(static_binary) 2>/dev/null | grep -q dynamically && \
		{ echo "make static: error: $(static_binary) is not static" >&2; exit 1; } || echo $(static_binary)

install: $(binary) $(manual)/minivmm.1 $(guest_build)/vmlinuz install-files

# `from` the binary to install; of the guest images, what is built.
from := $(binary)
strip :=
zsh := site-functions
install-files: $(manual)/minivmm.1
	@install -D -m 755 $(strip) -t $(installed)/bin $(from) $(from)-tools $(from)-export
	@install -d $(installed)/share/man/man1 $(installed)/share/doc/minivmm
	@install -m 644 $(manual)/*.1 $(installed)/share/man/man1
	@install -D -m 644 $(manual)/minivmm.bash $(installed)/share/bash-completion/completions/minivmm
	@install -D -m 644 $(manual)/_minivmm $(installed)/share/zsh/$(zsh)/_minivmm
	@install -D -m 644 $(manual)/minivmm.fish $(installed)/share/fish/vendor_completions.d/minivmm.fish
	@install -m 644 $(wildcard README.md) CONTRIBUTING.md CHANGELOG.md $(installed)/share/doc/minivmm
	@install -D -m 644 docs/*.* -t $(installed)/share/doc/minivmm/docs
	@install -D -m 644 docs/reference/* -t $(installed)/share/doc/minivmm/docs/reference
	@install -D -m 644 docs/results/* -t $(installed)/share/doc/minivmm/docs/results
	@install -m 644 LICENSE-APACHE LICENSE-MIT $(installed)/share/doc/minivmm
	@rm -f $(installed)/share/minivmm/vmlinux $(installed)/share/minivmm/modules.cpio
	@for image in vmlinuz vmlinux initrd.cpio modules.cpio; do \
		[ ! -e $(guest_build)/$$image ] || \
			install -D -m 644 $(guest_build)/$$image $(installed)/share/minivmm/$$image; \
	done
	@echo "installed in $(installed)"

# The package is made of what `make install` would install, with the static binary.
deb: $(static_binary) $(manual)/minivmm.1
	@command -v cargo-deb >/dev/null || cargo install --quiet --debug --locked cargo-deb
	@rm -rf target/stage
	@$(MAKE) --no-print-directory install-files from=$(static_binary) strip=--strip zsh=vendor-completions \
		PREFIX=/usr DESTDIR=target/stage
	@cargo deb --quiet --no-build --target x86_64-unknown-linux-gnu --output target/debian/

clean: guest-clean
	@cargo clean
