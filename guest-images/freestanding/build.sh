#!/bin/sh
# Builds a guest without a kernel: the C files of DIRECTORY and of this one, into FILE. Needs cc and ld.
# Usage: build.sh FILE DIRECTORY
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh FILE DIRECTORY}
guest=${2:?usage: build.sh FILE DIRECTORY}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cc -c -o "$work/entry.o" "$here/entry.S"
for source in "$here"/*.c "$guest"/*.c; do
    cc -c -O2 -std=gnu11 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-stack-protector -mno-red-zone \
        -mgeneral-regs-only -fno-asynchronous-unwind-tables -fcf-protection=none -fno-strict-aliasing \
        -I "$here" -o "$work/$(basename "$source" .c).o" "$source"
done
mkdir -p "$(dirname "$out")"
ld -N -nostdlib -static --build-id=none -z noexecstack --no-warn-rwx-segments -T "$here/guest.ld" \
    -o "$work/guest.elf" "$work"/*.o
chmod -x "$work/guest.elf" # no program of the host's
mv "$work/guest.elf" "$out"
