# minivmm's commands. `make run` and `make test` need nothing but Debian and Rust: they install what
# is missing, or print the line that does.

.DEFAULT_GOAL := help
.PHONY: help build run test lint deps clean check-guests torture

include guest-images/guest.mk

help: ## lists the commands
	@echo "make run          boots a test guest with a disk in cache=none, runs fio in it, tells what happened"
	@echo "make test         every check: lint, device, images, real kernels"
	@echo "make lint         formatting, clippy, licences and sources of the dependencies, shell scripts"
	@echo "make build        target/release/minivmm"
	@echo "make guest        the test guest's kernel and initramfs, in guest-images/build"
	@echo "make guest-small  a small kernel of our own, with virtio built in"
	@echo "make emuhost      the emulated host, for machines whose KVM cannot run Linux"
	@echo "make torture      the long suites"
	@echo "make clean        removes what was built"

build:
	@cargo build --release --locked

# Debian's packages that the rest needs: what is missing is installed, by root or with sudo.
PACKAGES := gcc make libc6-dev xz-utils zstd bzip2 cpio e2fsprogs strace fio openssh-client python3 \
	flex bison bc libelf-dev shellcheck tmux acpica-tools procps

deps:
	@guest-images/install-packages $(PACKAGES)

# Boots `minivmm --disk disk.img,cache=none`, here or in the emulated host.
run: deps build guest
	@guest-images/demo

# Single-threaded where a test's guests share two CPUs anyway.
test: deps lint guest-all guest-small
	@cargo test --release --locked
	@guest-images/which-host >/dev/null

lint: deps
	@cargo fmt --all -- --check
	@cargo clippy --release --locked --all-targets --quiet -- -D warnings
	@shellcheck --external-sources --source-path=SCRIPTDIR guest-images/which-host guest-images/demo \
		guest-images/install-packages guest-images/emuhost guest-images/build-guest guest-images/build-host \
		guest-images/build-small-kernel .ci/run
	@command -v cargo-deny >/dev/null || cargo install --quiet --debug --locked cargo-deny
	@cargo deny --log-level error check bans licenses sources

clean: guest-clean
	@cargo clean
