# shellcheck shell=bash
# Debian packages without root: resolve, download, verify, unpack. Sourced after common.sh.
# Owns a private apt state (sources list, indexes) in the cache; never touches the machine's own.
# The mirror, its keys and any proxy are those of the machine's apt configuration.

DEBS_DIR=$CACHE_DIR/debs
APT_STATE=$CACHE_DIR/apt
APT_INDEX_MAX_AGE_MINUTES=${MINIVMM_APT_MAX_AGE_MINUTES:-1440}

# shellcheck source=/dev/null
DEBIAN_CODENAME=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
DEBIAN_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# apt_mirror_of SUITE: the address from which the machine takes SUITE; empty when it takes none.
apt_mirror_of() {
    # shellcheck disable=SC2016  # apt expands it
    apt-get indextargets --no-release-info -o Dir::State::Lists=/nonexistent \
        --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v suite="$1" '$1 == suite { print $2; exit }'
}

apt_sources_list() {
    local base updates security backports signed="[signed-by=$DEBIAN_KEYRING]"
    base=$(apt_mirror_of "$DEBIAN_CODENAME")
    [ -n "$base" ] || die "no apt source for Debian '$DEBIAN_CODENAME' is configured on this machine: add one (man sources.list)"
    updates=$(apt_mirror_of "$DEBIAN_CODENAME-updates")
    security=$(apt_mirror_of "$DEBIAN_CODENAME-security")
    backports=$(apt_mirror_of "$DEBIAN_CODENAME-backports")
    printf 'deb %s %s %s main\n' "$signed" "$base" "$DEBIAN_CODENAME"
    printf 'deb-src %s %s %s main\n' "$signed" "$base" "$DEBIAN_CODENAME"
    [ -z "$updates" ] || printf 'deb %s %s %s-updates main\n' "$signed" "$updates" "$DEBIAN_CODENAME"
    [ -z "$security" ] || printf 'deb %s %s %s-security main\n' "$signed" "$security" "$DEBIAN_CODENAME"
    # Debian 12's own QEMU 7.2 hangs under nested load; the one in backports does not.
    [ "$DEBIAN_CODENAME" != bookworm ] ||
        printf 'deb %s %s %s-backports main\n' "$signed" "${backports:-$base}" "$DEBIAN_CODENAME"
}

apt_private() {
    local tool=$1
    shift
    # An empty dpkg status resolves dependencies from nothing, the same on every machine.
    "$tool" -q \
        -o Dir::Etc::SourceList="$APT_STATE/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State::Lists="$APT_STATE/lists" -o Dir::State::status=/dev/null \
        -o Dir::Cache="$APT_STATE/cache" -o APT::Sandbox::User="$(id -un)" \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::Retries=3 -o Acquire::ForceHash=SHA256 -o Debug::NoLocking=1 -o APT::Architecture=amd64 \
        -o APT::Install-Recommends=false -o APT::Get::Assume-Yes=true "$@"
}

# apt_ready [refresh]: makes the private indexes, and renews them when they are old.
apt_ready() {
    local wanted
    if [ -z "$DEBIAN_CODENAME" ] || [ ! -r "$DEBIAN_KEYRING" ]; then
        die "this needs Debian 12 or 13 (VERSION_CODENAME in /etc/os-release and $DEBIAN_KEYRING)"
    fi
    need apt-get apt
    mkdir -p "$APT_STATE/lists/partial" "$APT_STATE/cache/archives/partial" "$DEBS_DIR"
    wanted=$(apt_sources_list)
    if [ "${1:-}" != refresh ] && [ -e "$APT_STATE/fresh" ] &&
        [ "$wanted" = "$(cat "$APT_STATE/sources.list" 2>/dev/null)" ] &&
        [ -n "$(find "$APT_STATE/fresh" -mmin "-$APT_INDEX_MAX_AGE_MINUTES")" ]; then
        return
    fi
    printf '%s\n' "$wanted" >"$APT_STATE/sources.list"
    say "reading the package indexes of Debian $DEBIAN_CODENAME"
    if apt_private apt-get update >"$APT_STATE/update.log" 2>&1; then
        touch "$APT_STATE/fresh"
    elif [ -e "$APT_STATE/fresh" ]; then
        warn "the package indexes could not be renewed, going on with the old ones (see $APT_STATE/update.log)"
    else
        cat "$APT_STATE/update.log" >&2
        die "the package indexes could not be read"
    fi
}

# deb_uris PACKAGE[=VERSION|/SUITE]...: "file bytes sha256" of each package alone.
deb_uris() { apt_private apt-get download --print-uris "$@" | apt_uri_lines; }

# deb_closure_uris PACKAGE...: the same for the packages and all that they depend on.
deb_closure_uris() { apt_private apt-get install --print-uris "$@" | apt_uri_lines; }

apt_uri_lines() { awk '/^\047/ { sub(/^SHA256:/, "", $4); print $2, $3, $4 }'; }

# debs_download LIST: brings every file of LIST (lines of deb_uris) into $DEBS_DIR, verified.
debs_download() {
    local list=$1 file bytes sum spec missing=() total=0
    while read -r file bytes sum; do
        deb_is_good "$file" "$sum" && continue
        rm -f -- "$DEBS_DIR/$file"
        # The file name is PACKAGE_VERSION_ARCH.deb with the colon of an epoch as %3a.
        spec=${file%_*}
        missing+=("$(sed 's/_/=/; s/%3a/:/' <<<"$spec")")
        total=$((total + bytes))
    done <"$list"
    if [ ${#missing[@]} -gt 0 ]; then
        say "downloading ${#missing[@]} packages, $((total / 1000000 + 1)) MB"
        (cd "$DEBS_DIR" && apt_private apt-get download "${missing[@]}" >"$APT_STATE/download.log" 2>&1) ||
            { cat "$APT_STATE/download.log" >&2; return 1; }
    fi
    while read -r file bytes sum; do
        deb_is_good "$file" "$sum" || die "$DEBS_DIR/$file does not have the checksum of apt's index"
    done <"$list"
}

deb_is_good() { [ -e "$DEBS_DIR/$1" ] && [ "$(sha256_of "$DEBS_DIR/$1")" = "$2" ]; }

# debs_get LIST RESOLVER PACKAGE...: resolves and downloads; once more with new indexes when a
# mirror has dropped what the old indexes name.
debs_get() {
    local list=$1 resolver=$2
    shift 2
    apt_ready
    if "$resolver" "$@" >"$list" && [ -s "$list" ] && debs_download "$list"; then return; fi
    apt_ready refresh
    "$resolver" "$@" >"$list" || die "apt cannot resolve: $*"
    [ -s "$list" ] || die "apt knows no address for: $*"
    debs_download "$list" || die "the download failed: $*"
}

# debs_unpack LIST DIR [PATTERN]: unpacks the files of LIST whose name matches the shell PATTERN.
debs_unpack() {
    local file _ pattern=${3:-*}
    shopt -s extglob
    mkdir -p "$2"
    while read -r file _; do
        # shellcheck disable=SC2254  # a pattern is meant
        case $file in $pattern) dpkg-deb -x "$DEBS_DIR/$file" "$2" ;; esac
    done <"$1"
}
