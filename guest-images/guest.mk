# The images under guest-images/build: test guests, a small kernel, the emulated host. Included by
# the top Makefile. Owns when they are rebuilt; how is the business of the scripts it calls.
#
#   make guest                   Debian's 6.12 cloud kernel and the test initramfs; the default one
#   make guest KERNEL=6.1        the same with Debian's 6.1; it becomes the default one
#   make guest KERNEL=PATH [MODULES=DIR]   with a kernel of your own
#   make guest EXTRA="xfsprogs btrfs-progs f2fs-tools"   with programs of these Debian packages too, until
#                                another EXTRA (or an empty one) is given
#   make guest-all               6.12 and 6.1 side by side, 6.12 the default one
#   make guest-small             a small kernel with all of virtio built in (needs flex, bison, ...)
#   make emuhost                 the emulated host for machines whose KVM cannot run Linux
#   make emuhost EMUHOST_KERNEL=backports   the same with Debian's newest backported kernel (or 6.1): beside the default
#                                one, and used where EMUHOST_KERNEL says so, by study, bench-modes and the tests too
#   make emuhost-intel           the parts of an emulated Intel host, for make test-intel
#   make guest-refresh           takes newer packages, if Debian has any, with the next make
#   make guest-clean             removes all of it; downloads stay in the cache

KERNEL ?= 6.12
MODULES ?=
EMUHOST_KERNEL ?= 6.12
export EMUHOST_KERNEL
# EXTRA: what was given last stays, so that `make run` and `make test` do not undo it.

guest_dir := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))
guest_build := $(guest_dir)/build
guest_name := $(if $(filter 6.12 6.1,$(KERNEL)),$(KERNEL),own)
guest_common := $(wildcard $(guest_dir)/lib/common.sh $(guest_dir)/lib/apt.sh $(guest_dir)/lib/kernel.sh \
	$(guest_dir)/lib/rootfs.sh $(guest_dir)/lib/fio.sh $(guest_dir)/lib/mkcpio)
guest_inputs := $(guest_common) $(guest_dir)/lib/vmlinux.sh $(guest_dir)/build-guest $(wildcard $(guest_dir)/guest/*)
host_inputs := $(guest_common) $(guest_dir)/build-host $(wildcard $(guest_dir)/host/*)
intel_inputs := $(guest_common) $(guest_dir)/lib/bochs.sh $(guest_dir)/build-intel-host $(wildcard $(guest_dir)/intel/*)
small_inputs := $(guest_dir)/lib/common.sh $(guest_dir)/lib/apt.sh $(guest_dir)/build-small-kernel \
	$(guest_dir)/small-kernel.config

.PHONY: guest guest-all guest-small emuhost emuhost-intel guest-refresh guest-clean

extra_record := $(guest_build)/extra
ifeq ($(origin EXTRA),undefined)
EXTRA := $(file <$(extra_record))
endif
ifneq ($(strip $(EXTRA)),$(strip $(file <$(extra_record))))
.PHONY: $(extra_record)
endif
$(extra_record):
	@mkdir -p $(@D)
	@echo '$(strip $(EXTRA))' >$@

# vmlinuz, initrd.cpio and, where there are such, vmlinux and modules.cpio at a fixed place are the default
# guest: links to the one asked for last.
guest: $(guest_build)/$(guest_name)/manifest
	@ln -sfn $(guest_name)/vmlinuz $(guest_build)/vmlinuz
	@ln -sfn $(guest_name)/initrd.cpio $(guest_build)/initrd.cpio
	@rm -f $(guest_build)/vmlinux $(guest_build)/modules.cpio
	@for image in vmlinux modules.cpio; do \
		[ ! -e $(guest_build)/$(guest_name)/$$image ] || ln -s $(guest_name)/$$image $(guest_build)/$$image; \
	done

guest-all: guest $(guest_build)/6.12/manifest $(guest_build)/6.1/manifest

$(guest_build)/6.12/manifest $(guest_build)/6.1/manifest: $(guest_inputs) $(extra_record)
	@EXTRA='$(strip $(EXTRA))' $(guest_dir)/build-guest $(notdir $(@D))

ifeq ($(guest_name),own)
# Another path in KERNEL or MODULES is a new input too.
own_asked := $(abspath $(KERNEL)) $(and $(MODULES),$(abspath $(MODULES)))
own_record := $(guest_build)/own/asked
ifneq ($(own_asked),$(strip $(file <$(own_record))))
.PHONY: $(own_record)
endif
$(own_record):
	@mkdir -p $(@D)
	@echo '$(own_asked)' >$@

$(guest_build)/own/manifest: $(guest_inputs) $(KERNEL) $(own_record) $(extra_record)
	@EXTRA='$(strip $(EXTRA))' $(guest_dir)/build-guest '$(KERNEL)' $(if $(MODULES),'$(MODULES)')
endif

guest-small: $(guest_build)/small/manifest

$(guest_build)/small/manifest: $(small_inputs)
	@$(guest_dir)/build-small-kernel

host_name := $(if $(filter 6.12,$(EMUHOST_KERNEL)),host,host-$(EMUHOST_KERNEL))
emuhost: $(guest_build)/$(host_name)/manifest

$(guest_build)/$(host_name)/manifest: $(host_inputs)
	@$(guest_dir)/build-host '$(EMUHOST_KERNEL)'

emuhost-intel: $(guest_build)/intel/manifest

$(guest_build)/intel/manifest: $(intel_inputs)
	@$(guest_dir)/build-intel-host

guest-refresh:
	@rm -f $(guest_build)/*/manifest
	@rm -f "$${XDG_CACHE_HOME:-$$HOME/.cache}/minivmm/apt/fresh"

guest-clean:
	@rm -rf $(guest_build)
