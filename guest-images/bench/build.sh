#!/bin/sh
# Builds the benchmark guest into a file. Needs cc and ld. Usage: build.sh FILE
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh FILE}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cc -c -o "$work/entry.o" "$here/entry.S"
for part in main virtio text; do
    cc -c -O2 -std=gnu11 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-stack-protector -mno-red-zone \
        -mgeneral-regs-only -fno-asynchronous-unwind-tables -fcf-protection=none -o "$work/$part.o" "$here/$part.c"
done
mkdir -p "$(dirname "$out")"
ld -N -nostdlib -static --build-id=none -z noexecstack --no-warn-rwx-segments -T "$here/guest.ld" \
    -o "$work/guest.elf" "$work/entry.o" "$work/main.o" "$work/virtio.o" "$work/text.o"
chmod -x "$work/guest.elf" # no program of the host's
mv "$work/guest.elf" "$out"
