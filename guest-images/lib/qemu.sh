# shellcheck shell=bash
# The emulator: QEMU 10 or newer, unpacked from packages into the cache. Sourced after apt.sh.
# Debian 12's own QEMU 7.2 hung now and then under nested load; 10.0 from its backports did not.

# qemu_get WORK: sets QEMU_DIR, the unpacked tree, or "installed" for the machine's own.
qemu_get() {
    local suffix='' list=$1/qemu.list tag
    [ "$DEBIAN_CODENAME" != bookworm ] || suffix=/bookworm-backports
    if ! debs_get_qemu "$list" "$suffix"; then
        command -v qemu-system-x86_64 >/dev/null ||
            die "QEMU can be had neither from backports nor from this machine (Debian package qemu-system-x86)"
        warn "QEMU from backports cannot be had; the installed one, if older than 10.0, may hang under load"
        QEMU_DIR=installed
        : >"$list"
        QEMU_VERSION=$(qemu-system-x86_64 --version | head -n 1)
        return
    fi
    QEMU_VERSION=$(sed -n 's/^qemu-system-x86_\([^ ]*\)_amd64.deb .*/\1/p' "$list" | sed 's/%3a/:/')
    tag=$(sha256_of "$list" | cut -c1-16)
    QEMU_DIR=$CACHE_DIR/qemu/$tag
    [ -d "$QEMU_DIR" ] || qemu_unpack "$list"
}

# The closure holds all shared libraries, so that a bare machine needs none of them installed.
debs_get_qemu() {
    (debs_get "$1" deb_closure_uris "qemu-system-x86$2" "qemu-system-common$2" "qemu-system-data$2" "seabios$2")
}

qemu_unpack() {
    local list=$1 part=$QEMU_DIR.part
    say "unpacking QEMU $QEMU_VERSION"
    rm -rf "$part"
    debs_unpack "$list" "$part" '@(qemu-*|seabios*|lib*|zlib1g*)'
    # The C library and the loader belong together: those of the machine, of the same release.
    find "$part" \( -name 'libc.so.6' -o -name 'libm.so.6' -o -name 'libpthread.so.0' -o -name 'libdl.so.2' \
        -o -name 'librt.so.1' -o -name 'libresolv.so.2' -o -name 'libutil.so.1' -o -name 'ld-linux*' \) -delete
    mv "$part" "$QEMU_DIR"
}

# qemu_exec ARGUMENTS...: becomes the emulator of $QEMU_DIR.
qemu_exec() {
    local root=$QEMU_DIR lib=usr/lib/x86_64-linux-gnu
    [ "$root" != installed ] || exec qemu-system-x86_64 "$@"
    LD_LIBRARY_PATH=$root/$lib:$root/lib/x86_64-linux-gnu QEMU_MODULE_DIR=$root/$lib/qemu \
        exec "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/seabios" -L "$root/usr/share/qemu" "$@"
}
