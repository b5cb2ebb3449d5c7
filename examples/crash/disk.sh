#!/bin/sh
# Makes the disk of the walk-throughs in examples/crash/README.md: 64 MiB, an ext4 on the first 48, nothing behind it but
# the place for promises at 56 MiB. Needs no root.
# usage: disk.sh IMAGE [FILE]...
set -eu
PATH=$PATH:/usr/sbin:/sbin
image=$1
shift

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/data"
chmod 755 "$tree"
[ $# -eq 0 ] || cp "$@" "$tree/data/"
rm -f "$image"
truncate -s 64M "$image"
# Nothing is left for the kernel to initialise later: the log has the program's writes.
mkfs.ext4 -q -F -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 -d "$tree" "$image" 48M
