# shellcheck shell=bash
# One command line in a new emulated host, with the files that it names. Owns what is brought in
# and back; the paths inside are those outside (host/init binds them to the ext4 disk).

# named_file ARGUMENT: the file that an argument names, if it names an existing one.
named_file() {
    local word=$1 candidate
    # --option=PATH and file=PATH as well as PATH, each with ",key=value" behind it.
    for candidate in "$word" "${word%%,*}" "${word#*=}" "${word##*file=}"; do
        candidate=${candidate%%,*}
        if [ -n "$candidate" ] && [ -f "$candidate" ]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
}

# outer_path FILE: absolute, without links in the directories but with the name as given.
outer_path() { printf '%s/%s\n' "$(realpath -m -- "$(dirname -- "$1")")" "$(basename -- "$1")"; }

command_run() {
    local word file cwd dir
    parse_options "$@"
    [ ${#REST[@]} -gt 0 ] || usage_error "run wants -- COMMAND"
    host_build
    cwd=$(realpath .)
    RUN_DIR=$(mktemp -d "${TMPDIR:-/var/tmp}/emuhost.XXXXXX")
    dir=$RUN_DIR
    trap 'vm_end "$RUN_DIR"; rm -rf -- "$RUN_DIR"' EXIT
    stage_common "$dir/stage"
    : >"$dir/brought"
    mkdir -p "$dir/stage/fs$cwd"
    for word in "${REST[@]}"; do
        file=$(named_file "$word")
        [ -z "$file" ] || bring_in "$dir" "$file" "$(outer_path "$file")"
    done
    for word in "${COPIES[@]}"; do bring_copy "$dir" "$word" "$cwd"; done
    printf '%s\n' "$cwd" >>"$dir/stage/.emuhost/dirs"
    sort -u -o "$dir/stage/.emuhost/dirs" "$dir/stage/.emuhost/dirs"
    vm_disk "$dir" "$dir/stage"
    run_inside "$dir" "$cwd"
}

bring_copy() {
    local dir=$1 copy=$2 cwd=$3 name=${2#*:} file=${2%%:*}
    [ -f "$file" ] || die "--copy-in $file: no such file"
    [ "$name" != "$copy" ] || name=$file
    case $name in
    /*) ;;
    *) name=$cwd/$name ;;
    esac
    bring_in "$dir" "$file" "$name"
}

# bring_in DIR FILE NAME: FILE on the disk under the path NAME.
bring_in() {
    local dir=$1 file=$2 name=$3
    [ ! -e "$dir/stage/fs$name" ] || return 0
    place "$file" "$dir/stage/fs$name"
    dirname -- "$name" >>"$dir/stage/.emuhost/dirs"
    printf '%s %s\n' "$(stat -L -c '%Y %s' -- "$file")" "$name" >>"$dir/brought"
    [ ! -x "$file" ] || stage_libraries "$dir/stage" "$file"
}

run_inside() {
    local dir=$1 cwd=$2 limit=${LIMIT_SECONDS:-900} status=0
    vm_start "$dir" 0
    vm_exec "$dir" auto "$limit" "$cwd" "${REST[@]}" || status=$?
    if ! vm_alive "$dir"; then
        say "files changed inside are not brought back"
        return "$status"
    fi
    bring_back "$dir" || status=$STATUS_EMULATOR
    return "$status"
}

# bring_back DIR: what the command has changed or made. The list is made inside; the bytes are
# read from the unmounted disk, which is much faster than through the emulated network.
bring_back() {
    local dir=$1 seconds bytes name
    vm_session "$dir" -- 'cd /data/fs && find . -type f -exec stat -c "%Y %s %n" {} +' </dev/null >"$dir/after" || return
    sed -i 's| \./| /|' "$dir/after"
    ! cmp -s <(sort "$dir/after") <(sort "$dir/brought") || return 0
    vm_stop "$dir"
    while read -r seconds bytes name; do
        ! grep -qxF -- "$seconds $bytes $name" "$dir/brought" || continue
        fetch "$dir" "$bytes" "$name" || { say "error: $name could not be brought back"; return 1; }
    done <"$dir/after"
}

# fetch DIR BYTES NAME: NAME from the disk, complete or not at all; the holes stay holes.
fetch() {
    local dir=$1 bytes=$2 name=$3 target part
    need debugfs e2fsprogs
    target=$(realpath -m -- "$name")
    part=$(mktemp "$(dirname -- "$target")/.emuhost.XXXXXX")
    truncate -s "$bytes" "$part"
    debugfs -R "cat \"/fs$name\"" "$dir/disk.img" 2>/dev/null | dd of="$part" bs=64K conv=sparse,notrunc iflag=fullblock status=none || return
    [ "$(stat -c %s "$part")" = "$bytes" ] || return
    if [ -e "$target" ]; then chmod --reference="$target" "$part"; else chmod 644 "$part"; fi
    mv -f -- "$part" "$target"
}
