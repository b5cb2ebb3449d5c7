#!/bin/sh
# Builds the bare-metal guest twice into a directory: pvh.elf with the PVH note, elf.elf without it.
# Needs cc and ld, which a machine with Rust has. Usage: build.sh DIRECTORY [SYMBOL=VALUE]...
# The symbols place devices, by default where minivmm has them.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh DIRECTORY [SYMBOL=VALUE]...}
shift
symbols="--defsym VIRTIO_MMIO_BASE=0xd0000000"
symbols="$symbols --defsym PORT_ACPI_SLEEP_CONTROL=0x600 --defsym PORT_ACPI_RESET=0x602"
for symbol in "$@"; do
    symbols="$symbols --defsym $symbol"
done
mkdir -p "$out"
cc -c -o "$out/elf.o" "$here/guest.S"
cc -c -DPVH_NOTE -o "$out/pvh.o" "$here/guest.S"
for entry in elf pvh; do
    # shellcheck disable=SC2086 # the symbols are words
    ld -N -nostdlib -static --build-id=none -z noexecstack --no-warn-rwx-segments \
        -T "$here/guest.ld" $symbols -o "$out/$entry.elf" "$out/$entry.o"
    chmod -x "$out/$entry.elf" # no program of the host's
done
