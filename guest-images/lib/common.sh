# shellcheck shell=bash
# Messages, places and small file helpers shared by the scripts here. Sourced, never run.
# Owns where downloads and expensive results are kept; knows nothing of packages or images.

IMAGES_DIR=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
BUILD_DIR=${MINIVMM_GUEST_BUILD:-$IMAGES_DIR/build}
CACHE_DIR=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/minivmm
PROGRAM=${0##*/}

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }
warn() { printf '%s: warning: %s\n' "$PROGRAM" "$*" >&2; }
die() {
    printf '%s: error: %s\n' "$PROGRAM" "$*" >&2
    exit 1
}

# need COMMAND PACKAGE: fails with the package to install when COMMAND is missing.
need() {
    command -v "$1" >/dev/null 2>&1 || die "'$1' is not installed (Debian package $2)"
}

# with_lock NAME COMMAND...: one process at a time per NAME; the lock goes with the process.
with_lock() {
    local name=$1 fd status=0
    shift
    mkdir -p "$CACHE_DIR"
    exec {fd}>"$CACHE_DIR/$name.lock"
    if ! flock -n "$fd"; then
        say "waiting for another run that holds $CACHE_DIR/$name.lock"
        flock "$fd"
    fi
    # The command must not inherit the lock: a daemon left behind would keep it.
    "$@" {fd}>&- || status=$?
    exec {fd}>&-
    return "$status"
}

sha256_of() { sha256sum -- "$1" | cut -d' ' -f1; }

# host_scripts: what tells whether an emulated host has the scripts that this version talks to.
host_scripts() { cat "$IMAGES_DIR"/host/* | sha256sum | cut -d' ' -f1; }

# tree_bytes DIR: bytes of the regular files below DIR.
tree_bytes() { find "$1" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'; }

# scratch_dir VARIABLE: a temporary directory beside the results, removed when the script ends.
SCRATCH_DIRS=()
scratch_dir() {
    local -n made=$1
    mkdir -p "$BUILD_DIR"
    made=$(mktemp -d "$BUILD_DIR/tmp.XXXXXX")
    SCRATCH_DIRS+=("$made")
    trap 'rm -rf -- "${SCRATCH_DIRS[@]}"' EXIT
}
