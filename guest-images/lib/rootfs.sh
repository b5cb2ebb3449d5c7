# shellcheck shell=bash
# The pieces of an initramfs tree: programs with their libraries, busybox, kernel modules, cpio.
# Sourced after common.sh. Owns the layout of the tree; knows nothing of what runs in it.

ROOTFS_LIB=lib/x86_64-linux-gnu

# rootfs_program TREE DEBROOT PATH [NAME]: copies a program and the libraries that it names.
rootfs_program() {
    local tree=$1 debroot=$2 path=$3 name=${4:-${3##*/}}
    [ -e "$debroot/$path" ] || die "the packages hold no /$path"
    install -D -m 755 "$debroot/$path" "$tree/usr/bin/$name"
    strip --strip-unneeded "$tree/usr/bin/$name" 2>/dev/null || true
    rootfs_libraries "$tree" "$debroot" "$tree/usr/bin/$name"
}

# rootfs_libraries TREE DEBROOT ELF: the shared libraries of ELF, and theirs, and the loader.
rootfs_libraries() {
    local tree=$1 debroot=$2 elf=$3 soname found
    # The output of objdump is English in the C locale only.
    for soname in $(LC_ALL=C objdump -p "$elf" 2>/dev/null | awk '$1 == "NEEDED" { print $2 }'); do
        [ ! -e "$tree/$ROOTFS_LIB/$soname" ] || continue
        found=$(find "$debroot/lib" "$debroot/usr/lib" "$debroot/lib64" -name "$soname" 2>/dev/null | head -n 1)
        [ -n "$found" ] || die "${elf##*/} wants $soname, which none of the packages holds"
        install -D -m 755 "$(realpath "$found")" "$tree/$ROOTFS_LIB/$soname"
        strip --strip-unneeded "$tree/$ROOTFS_LIB/$soname" 2>/dev/null || true
        rootfs_libraries "$tree" "$debroot" "$tree/$ROOTFS_LIB/$soname"
    done
    if [ -e "$tree/$ROOTFS_LIB/ld-linux-x86-64.so.2" ]; then
        mkdir -p "$tree/lib64"
        ln -sf "../$ROOTFS_LIB/ld-linux-x86-64.so.2" "$tree/lib64/ld-linux-x86-64.so.2"
    fi
}

# rootfs_libraries_bytes TREE DEBROOT ELF: bytes of the shared libraries that ELF would bring into TREE.
rootfs_libraries_bytes() {
    local tree=$1 debroot=$2 elf soname found bytes=0
    local -a elves=("$3")
    local -A seen=()
    while [ ${#elves[@]} -gt 0 ]; do
        elf=${elves[0]}
        elves=("${elves[@]:1}")
        for soname in $(LC_ALL=C objdump -p "$elf" 2>/dev/null | awk '$1 == "NEEDED" { print $2 }'); do
            [ -z "${seen[$soname]:-}" ] && [ ! -e "$tree/$ROOTFS_LIB/$soname" ] || continue
            seen[$soname]=yes
            found=$(find "$debroot/lib" "$debroot/usr/lib" "$debroot/lib64" -name "$soname" 2>/dev/null | head -n 1)
            [ -n "$found" ] || continue
            bytes=$((bytes + $(stat -L -c %s -- "$found")))
            elves+=("$found")
        done
    done
    printf '%s\n' "$bytes"
}

# rootfs_busybox TREE DEBROOT: busybox and a link for each applet that no real program provides.
# Debian's busybox shell prefers its own applets to any program of the same name (its blkdiscard
# knows no -z), so /bin/sh is dash; the interactive busybox shell learns the real ones by alias.
rootfs_busybox() {
    local tree=$1 debroot=$2 busybox applet
    busybox=$(find "$debroot/bin" "$debroot/usr/bin" -name busybox -type f 2>/dev/null | head -n 1)
    [ -n "$busybox" ] || die "the packages hold no busybox"
    install -D -m 755 "$busybox" "$tree/bin/busybox"
    rootfs_program "$tree" "$debroot" "$(cd "$debroot" && find bin usr/bin -name dash 2>/dev/null | head -n 1)" sh
    ln -sf ../usr/bin/sh "$tree/bin/sh"
    for applet in "$tree"/usr/bin/*; do
        printf "alias %s=/usr/bin/%s\n" "${applet##*/}" "${applet##*/}"
    done >"$tree/etc/shellrc"
    for applet in $("$busybox" --list); do
        [ "$applet" = busybox ] || [ -e "$tree/usr/bin/$applet" ] || [ -e "$tree/bin/$applet" ] || ln -s busybox "$tree/bin/$applet"
    done
}

# Programs are in /usr/bin and busybox's in /bin; the names with sbin lead there, since scripts and the
# kernel itself (/sbin/modprobe) use them.
rootfs_skeleton() {
    mkdir -p "$1"/{bin,dev,etc,lib/modules,mnt,proc,root,run,sys,tmp,usr/bin,var}
    ln -s bin "$1/usr/sbin"
    ln -s bin "$1/sbin"
    printf 'root:x:0:0:root:/root:/bin/sh\n' >"$1/etc/passwd"
    printf 'root:x:0:\n' >"$1/etc/group"
    ln -s /proc/mounts "$1/etc/mtab"
}

# rootfs_modules TREE MODULES_DIR NAME...: the modules with their dependencies, decompressed, and
# lib/modules/order, the order of loading. A module that the kernel does not have is no error: it
# is built in, or the device is one that this kernel cannot drive.
rootfs_modules() {
    local tree=$1 dir=$2 name
    shift 2
    : >"$tree/lib/modules/order"
    for name in "$@"; do rootfs_module "$tree" "$dir" "$name"; done
}

rootfs_module() {
    local tree=$1 dir=$2 name=$3 file target dependency
    target=$tree/lib/modules/${name//-/_}.ko
    [ ! -e "$target" ] || return 0
    # In file names a dash and an underscore mean the same.
    file=$(find "$dir" -regextype posix-extended -regex ".*/${name//[-_]/[-_]}\.ko(\.xz|\.zst|\.gz)?" | sort | head -n 1)
    [ -n "$file" ] || return 0
    case $file in
    *.xz) xz -dc -- "$file" >"$target" ;;
    *.zst) zstd -qdc -- "$file" >"$target" ;;
    *.gz) gzip -dc -- "$file" >"$target" ;;
    *) cp -- "$file" "$target" ;;
    esac
    for dependency in $(tr '\0' '\n' <"$target" | sed -n 's/^depends=//p' | tr ',' ' '); do
        rootfs_module "$tree" "$dir" "$dependency"
    done
    strip --strip-debug "$target" 2>/dev/null || true
    printf '%s\n' "${target##*/}" >>"$tree/lib/modules/order"
}

# rootfs_pack TREE ARCHIVE: the cpio archive, complete or not there at all.
rootfs_pack() {
    perl "$IMAGES_DIR/lib/mkcpio" --node dev/console:5:1 --node dev/null:1:3 "$1" >"$2.part"
    mv -- "$2.part" "$2"
}
