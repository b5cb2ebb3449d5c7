# shellcheck shell=bash disable=SC2034
# Debian's cloud kernels, or one of the user's. Sourced after common.sh and apt.sh.

# The suite of the kernel "backports".
KERNEL_BACKPORTS=trixie-backports

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
    backports) kernel_of_backports "$3" ;;
    *) kernel_of_user "$1" "$2" "$3" ;;
    esac
}

kernel_of_debian() {
    local series=$1 work=$2
    apt_ready
    kernel_download "$series" "$work"
    kernel_unpack "$work"
}

# kernel_of_backports WORK: the newest kernel that is backported to a Debian release, for an emulated host that
# has what the release's own kernel lacks. Any release's apt can read that index, and nothing is installed.
kernel_of_backports() {
    local work=$1
    (
        # An index of its own: nothing else is ever resolved from this suite.
        APT_STATE=$CACHE_DIR/apt-$KERNEL_BACKPORTS
        apt_sources_list() {
            local mirror
            mirror=$(apt_mirror_of "$KERNEL_BACKPORTS")
            [ -n "$mirror" ] || mirror=$(apt_mirror_of "$DEBIAN_CODENAME")
            [ -n "$mirror" ] || die "no apt source for Debian '$DEBIAN_CODENAME' is configured on this machine: add one (man sources.list)"
            printf 'deb [signed-by=%s] %s %s main\n' "$DEBIAN_KEYRING" "$mirror" "$KERNEL_BACKPORTS"
        }
        apt_ready
        kernel_download '' "$work"
    ) || exit
    kernel_unpack "$work"
}

# kernel_download SERIES WORK: brings the packages of the kernel, and their list, WORK/kernel.list.
kernel_download() {
    local package
    local -a parts
    package=$(kernel_package "$1") || exit
    # Since Linux 7 the package of the image is empty, and depends on one with vmlinuz and one with the modules.
    mapfile -t parts < <(depends_of "$package" | grep -E '^linux-(binary|modules)-[0-9]')
    debs_get "$2/kernel.list" deb_uris "$package" "${parts[@]}"
}

# kernel_unpack WORK: sets KERNEL_IMAGE, KERNEL_MODULES and KERNEL_VERSION.
kernel_unpack() {
    local tree=$1/kernel package
    debs_unpack "$1/kernel.list" "$tree"
    package=$(grep -o '^linux-image-[^_]*' "$1/kernel.list")
    KERNEL_MODULES=$(find "$tree/lib/modules" "$tree/usr/lib/modules" -mindepth 1 -maxdepth 1 2>/dev/null | head -n 1)
    KERNEL_IMAGE=$(find "$tree/boot" "$KERNEL_MODULES" -maxdepth 1 -name 'vmlinuz*' 2>/dev/null | head -n 1)
    if [ -z "$KERNEL_IMAGE" ] || [ ! -d "$KERNEL_MODULES/kernel" ]; then
        die "the package $package holds no kernel where one is looked for (boot/vmlinuz-*, lib/modules/*)"
    fi
    KERNEL_VERSION="${KERNEL_MODULES##*/} ($package)"
}

# depends_of PACKAGE: the names of the packages that it depends on, one a line.
depends_of() {
    apt_private apt-cache show --no-all-versions "$1" 2>/dev/null |
        sed -n 's/^Depends: *//p' | tr ',' '\n' | sed 's/^ *//; s/ .*//'
}

# kernel_package SERIES: the package with the image itself, which a metapackage depends on; of any series if
# SERIES is empty. Debian 12 names its newer kernel linux-image-6.12-cloud-amd64; on 13 it is linux-image-cloud-amd64.
kernel_package() {
    local series=$1 meta found
    for meta in ${series:+"linux-image-$series-cloud-amd64"} linux-image-cloud-amd64; do
        found=$(depends_of "$meta" | grep -E "^linux-image-${series:+${series//./\\.}\.}[0-9]" | head -n 1) || true
        [ -z "$found" ] || { printf '%s\n' "$found"; return; }
    done
    die "Debian $DEBIAN_CODENAME has no ${series:+$series }cloud kernel (give KERNEL=PATH for one of your own)"
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
