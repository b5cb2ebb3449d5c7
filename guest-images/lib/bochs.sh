# shellcheck shell=bash disable=SC2034
# The emulator of Intel's processors: Bochs, and what makes a bootable CD for it, unpacked from packages
# into the cache without installing anything. Sourced after apt.sh.

BOCHS_PACKAGES=(bochs bochs-term bochsbios vgabios grub-common grub-pc-bin xorriso)

# bochs_get WORK: sets BOCHS_DIR, the unpacked tree, and BOCHS_VERSION.
bochs_get() {
    local list=$1/bochs.list tag
    debs_get "$list" bochs_uris "${BOCHS_PACKAGES[@]}"
    BOCHS_VERSION=$(sed -n 's/^bochs_\([^ ]*\)_amd64.deb .*/\1/p' "$list")
    tag=$(sha256_of "$list" | cut -c1-16)
    BOCHS_DIR=$CACHE_DIR/bochs/$tag
    [ -d "$BOCHS_DIR" ] || bochs_unpack "$list"
}

# bochs_uris PACKAGE...: the packages and the libraries among all that they depend on; the rest of a
# desktop is not needed to run them.
bochs_uris() { deb_closure_uris "$@" | grep -E '^(bochs|vgabios|grub|xorriso|lib|zlib1g)'; }

bochs_unpack() {
    local part=$BOCHS_DIR.part
    say "unpacking Bochs $BOCHS_VERSION"
    rm -rf "$part"
    debs_unpack "$1" "$part"
    # The C library and the loader belong together: those of the machine, of the same release.
    find "$part" \( -name 'libc.so.6' -o -name 'libm.so.6' -o -name 'libpthread.so.0' -o -name 'libdl.so.2' \
        -o -name 'librt.so.1' -o -name 'libresolv.so.2' -o -name 'libutil.so.1' -o -name 'ld-linux*' \) -delete
    mv "$part" "$BOCHS_DIR"
}

# bochs_tool NAME ARGUMENT...: a program of the unpacked tree.
bochs_tool() {
    local lib=usr/lib/x86_64-linux-gnu
    LD_LIBRARY_PATH=$BOCHS_DIR/$lib:$BOCHS_DIR/lib/x86_64-linux-gnu "$BOCHS_DIR/usr/bin/$1" "${@:2}"
}

# bochs_exec ARGUMENT...: becomes the emulator. Of its displays, term needs neither a window system nor a
# port of the network, but a terminal, which script (package bsdutils) gives it.
bochs_exec() {
    local lib=usr/lib/x86_64-linux-gnu command
    printf -v command '%q ' env "BXSHARE=$BOCHS_DIR/usr/share/bochs" \
        "LTDL_LIBRARY_PATH=$BOCHS_DIR/$lib/bochs/plugins" \
        "LD_LIBRARY_PATH=$BOCHS_DIR/$lib:$BOCHS_DIR/lib/x86_64-linux-gnu" "$BOCHS_DIR/usr/bin/bochs-bin" "$@"
    TERM=vt100 exec script --quiet --return --command "exec $command" /dev/null
}
