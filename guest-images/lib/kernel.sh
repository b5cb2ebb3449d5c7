# shellcheck shell=bash disable=SC2034
# Debian's cloud kernels, or one of the user's. Sourced after common.sh and apt.sh.

# kernel_name KERNEL: the directory name of a kernel's results.
kernel_name() {
    case $1 in
    6.12 | 6.1) printf '%s\n' "$1" ;;
    *) printf 'own\n' ;;
    esac
}

# kernel_get KERNEL MODULES_DIR WORK: sets KERNEL_IMAGE, KERNEL_MODULES and KERNEL_VERSION.
kernel_get() {
    case $1 in
    6.12 | 6.1) kernel_of_debian "$1" "$3" ;;
    *) kernel_of_user "$1" "$2" "$3" ;;
    esac
}

kernel_of_debian() {
    local series=$1 work=$2 package
    apt_ready
    package=$(kernel_package "$series")
    debs_get "$work/kernel.list" deb_uris "$package"
    debs_unpack "$work/kernel.list" "$work/kernel"
    KERNEL_IMAGE=$(find "$work/kernel/boot" -name 'vmlinuz-*')
    KERNEL_MODULES=$(find "$work/kernel/lib/modules" "$work/kernel/usr/lib/modules" -maxdepth 1 -name "$series*" 2>/dev/null | head -n 1)
    KERNEL_VERSION="${KERNEL_IMAGE##*/vmlinuz-} ($package)"
}

# kernel_package SERIES: the package with the image itself, which a metapackage depends on. Debian
# 12 names its newer kernel linux-image-6.12-cloud-amd64; on 13 it is linux-image-cloud-amd64.
kernel_package() {
    local series=$1 meta found
    for meta in "linux-image-$series-cloud-amd64" linux-image-cloud-amd64; do
        found=$(apt_private apt-cache show --no-all-versions "$meta" 2>/dev/null |
            sed -n 's/^Depends: *//p' | tr ',' '\n' |
            sed -n "s/^ *\(linux-image-${series//./\\.}\.[^ ]*\).*/\1/p" | head -n 1)
        [ -z "$found" ] || { printf '%s\n' "$found"; return; }
    done
    die "Debian $DEBIAN_CODENAME has no $series cloud kernel (give KERNEL=PATH for one of your own)"
}

kernel_of_user() {
    local image=$1 modules=$2 work=$3
    [ -r "$image" ] || die "KERNEL=$image: no such file (6.12, 6.1 or a path is wanted)"
    [ -z "$modules" ] || [ -d "$modules" ] || die "MODULES=$modules: no such directory"
    mkdir -p "$work/no-modules"
    KERNEL_IMAGE=$image
    KERNEL_MODULES=${modules:-$work/no-modules}
    KERNEL_VERSION="of the user, $image"
}
