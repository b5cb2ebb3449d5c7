# The images under guest-images/build: test guests, a small kernel, the emulated host. Included by
# the top Makefile. Owns when they are rebuilt; how is the business of the scripts it calls.
#
#   make guest                   Debian's 6.12 cloud kernel and the test initramfs; the default one
#   make guest KERNEL=6.1        the same with Debian's 6.1; it becomes the default one
#   make guest KERNEL=PATH [MODULES=DIR]   with a kernel of your own
#   make guest-all               6.12 and 6.1 side by side, 6.12 the default one
#   make guest-small             a small kernel with all of virtio built in (needs flex, bison, ...)
#   make emuhost                 the emulated host for machines whose KVM cannot run Linux
#   make emuhost-intel           the parts of an emulated Intel host, for make test-intel
#   make guest-refresh           takes newer packages, if Debian has any, with the next make
#   make guest-clean             removes all of it; downloads stay in the cache

KERNEL ?= 6.12
MODULES ?=

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

# vmlinuz, initrd.cpio and, where it could be unpacked, vmlinux at a fixed place are the default guest:
# links to the one asked for last.
guest: $(guest_build)/$(guest_name)/manifest
	@ln -sfn $(guest_name)/vmlinuz $(guest_build)/vmlinuz
	@ln -sfn $(guest_name)/initrd.cpio $(guest_build)/initrd.cpio
	@rm -f $(guest_build)/vmlinux
	@[ ! -e $(guest_build)/$(guest_name)/vmlinux ] || ln -s $(guest_name)/vmlinux $(guest_build)/vmlinux

guest-all: guest $(guest_build)/6.12/manifest $(guest_build)/6.1/manifest

$(guest_build)/6.12/manifest $(guest_build)/6.1/manifest: $(guest_inputs)
	@$(guest_dir)/build-guest $(notdir $(@D))

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

$(guest_build)/own/manifest: $(guest_inputs) $(KERNEL) $(own_record)
	@$(guest_dir)/build-guest '$(KERNEL)' $(if $(MODULES),'$(MODULES)')
endif

guest-small: $(guest_build)/small/manifest

$(guest_build)/small/manifest: $(small_inputs)
	@$(guest_dir)/build-small-kernel

emuhost: $(guest_build)/host/manifest

$(guest_build)/host/manifest: $(host_inputs)
	@$(guest_dir)/build-host

emuhost-intel: $(guest_build)/intel/manifest

$(guest_build)/intel/manifest: $(intel_inputs)
	@$(guest_dir)/build-intel-host

guest-refresh:
	@rm -f $(guest_build)/*/manifest
	@rm -f "$${XDG_CACHE_HOME:-$$HOME/.cache}/minivmm/apt/fresh"

guest-clean:
	@rm -rf $(guest_build)
