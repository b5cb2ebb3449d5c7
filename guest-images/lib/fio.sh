# shellcheck shell=bash
# A small static fio from Debian's source package. Sourced after common.sh and apt.sh.
# Debian's binary links some thirty storage libraries (rbd, gfapi, pmem, iscsi, rdma, ...); the
# guest has none of them. The same source, configured without them, is one honest 2 MB file;
# stub libraries under their names would be smaller to make but would crash when called.

# fio_build: prints the path of the cached binary, building it when there is none.
fio_build() {
    local sources work tag
    apt_ready
    sources=$(apt_private apt-get source --download-only --print-uris fio | apt_uri_lines)
    [ -n "$sources" ] || die "the mirror offers no source package of fio"
    # libaio comes from the same release, so the source, the release and this file are all inputs.
    tag=$({ printf '%s\n' "$sources" "$DEBIAN_CODENAME"; cat "${BASH_SOURCE[0]}"; } | sha256sum | cut -c1-16)
    FIO_VERSION=$(awk '/\.dsc / { sub(/^fio_/, "", $1); sub(/\.dsc$/, "", $1); print $1 }' <<<"$sources")
    FIO_BINARY=$CACHE_DIR/fio/$FIO_VERSION-$tag/fio
    [ ! -x "$FIO_BINARY" ] || return 0
    need gcc gcc
    need make make
    scratch_dir work
    say "building fio $FIO_VERSION from Debian's source (about a minute)"
    fio_unpack "$work" "$sources"
    (cd "$work/src" && fio_compile "$work") >"$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; die "fio did not build"; }
    install -D -m 755 "$work/src/fio" "$FIO_BINARY.part"
    strip "$FIO_BINARY.part"
    mv "$FIO_BINARY.part" "$FIO_BINARY"
}

fio_unpack() {
    local work=$1 sources=$2 file _ sum
    (cd "$work" && apt_private apt-get source --download-only fio >"$work/log" 2>&1) ||
        { cat "$work/log" >&2; die "the download of fio's source failed"; }
    while read -r file _ sum; do
        [ "$(sha256_of "$work/$file")" = "$sum" ] || die "$file does not have the checksum of apt's index"
    done <<<"$sources"
    mkdir "$work/src"
    # Debian's own patches concern only where files are installed; none is needed here.
    tar -xf "$(find "$work" -name 'fio_*.orig.tar.*' ! -name '*.asc')" --strip-components=1 -C "$work/src"
    debs_get "$work/list" deb_uris libaio-dev
    debs_unpack "$work/list" "$work/libaio"
}

fio_compile() {
    local work=$1 libaio
    libaio=$(dirname "$(find "$work/libaio" -name libaio.a)")
    # zlib is wanted for nothing here; without it the build needs no -dev package but libc's.
    ./configure --build-static --disable-native --disable-rdma --disable-rados --disable-rbd \
        --disable-http --disable-gfapi --disable-libnfs --disable-pmem --disable-numa \
        --disable-shm --disable-lex --disable-tcmalloc \
        --extra-cflags="-I$work/libaio/usr/include -L$libaio"
    grep -q '^CONFIG_LIBAIO' config-host.mak || { echo "configure found no libaio"; return 1; }
    make -j"$(nproc)" V=1 LDFLAGS="-static -L$libaio" fio
}
