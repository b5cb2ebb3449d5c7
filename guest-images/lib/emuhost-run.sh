# shellcheck shell=bash
# One command line in an emulated host, with the files that it names. Owns what is brought in and back; the
# paths inside are those outside (host/emuhost-dirs binds them to the run's ext4 disk).

# A directory that an argument names and that is larger comes in with --add alone.
NAMED_DIR_BYTES_MAX=$((256 * 1024 * 1024))
# Directories that mean something inside too: they are brought by --add alone.
NAMED_DIRS_NOT='^/(bin|boot|data|dev|etc|home|lib[0-9]*|media|mnt|opt|proc|root|run|sbin|srv|sys|tmp|usr|var)?(/(tmp|bin|sbin|lib))?$'

# named_path ARGUMENT: the file or directory that an argument names, if it names an existing one.
named_path() {
    local word=$1 candidate
    # --option=PATH and file=PATH as well as PATH, each with ",key=value" or ":PLACE" behind it.
    for candidate in "$word" "${word%%,*}" "${word%%:*}" "${word#*=}" "${word##*file=}"; do
        candidate=${candidate%%,*}
        # The kernel's own files are those of inside.
        case $(realpath -m -- "$candidate" 2>/dev/null) in /proc/* | /sys/* | /dev/*) continue ;; esac
        if [ -n "$candidate" ] && { [ -f "$candidate" ] || is_named_dir "$candidate"; }; then
            printf '%s\n' "$candidate"
            return
        fi
    done
}

# is_named_dir PATH: a directory that is meant to come in: none of the system's, nor one that we work below.
is_named_dir() {
    local path bytes
    [ -d "$1" ] || return 1
    path=$(realpath -- "$1")
    [[ ! $path =~ $NAMED_DIRS_NOT ]] && [ "$path" != "${HOME:-/}" ] || return 1
    case $(realpath .)/ in "$path"/?*) return 1 ;; esac
    bytes=$(du -s --block-size=1 -- "$path" 2>/dev/null | cut -f1)
    [ "${bytes:-0}" -gt "$NAMED_DIR_BYTES_MAX" ] || return 0
    say "warning: the directory $1 has $((bytes / 1024 / 1024)) MiB and is not brought in: --add $1 brings it"
    return 1
}

# outer_path FILE: absolute, without links in the directories but with the name as given.
outer_path() { printf '%s/%s\n' "$(realpath -m -- "$(dirname -- "$1")")" "$(basename -- "$1")"; }

command_run() {
    local word file cwd
    parse_options "$@"
    [ ${#REST[@]} -gt 0 ] || usage_error "run wants -- COMMAND"
    host_build
    cwd=$(realpath .)
    RUN_DIR=$(mktemp -d "${TMPDIR:-/var/tmp}/emuhost.XXXXXX")
    RUN_HOST='' RUN_MIRROR=''
    trap 'run_end' EXIT
    stage_binary "$RUN_DIR/stage"
    : >"$RUN_DIR/brought"
    mkdir -p "$RUN_DIR/stage/fs$cwd"
    for word in "${REST[@]}"; do
        file=$(named_path "$word")
        [ -z "$file" ] || bring_in "$file" "$(outer_path "$file")"
    done
    for word in "${COPIES[@]}"; do bring_copy "$word" "$cwd"; done
    printf '%s\n' "$cwd" >>"$RUN_DIR/stage/.emuhost/dirs"
    sort -u -o "$RUN_DIR/stage/.emuhost/dirs" "$RUN_DIR/stage/.emuhost/dirs"
    cp "$RUN_DIR/stage/.emuhost/dirs" "$RUN_DIR/dirs"
    cut -d' ' -f3- "$RUN_DIR/brought" >"$RUN_DIR/stage/.emuhost/brought"
    run_host
    run_inside "$cwd"
}

# run_host: sets RUN_HOST to the directory of a host in which the run's disk is at /data: one that is kept, or
# one of the run's own.
run_host() {
    if [ -z "$FRESH" ] && [ -z "$LOG_WRITES" ] && [ "$WARM_SECONDS" -gt 0 ] && warm_take; then
        vm_disk "$RUN_DIR" "$RUN_DIR/stage"
        RUN_HOST=$WARM_HOST
        warm_open "$RUN_HOST" "$RUN_DIR/disk.img" && return
        say "the host that was kept took no disk; another one is started"
        warm_discard "$RUN_HOST"
        warm_start "$RUN_HOST" "$(warm_key)"
        warm_open "$RUN_HOST" "$RUN_DIR/disk.img" && return
        say "error: the emulated host took no disk (see $RUN_HOST/qemu.log)"
        exit "$STATUS_EMULATOR"
    fi
    stage_guests "$RUN_DIR/stage"
    vm_disk "$RUN_DIR" "$RUN_DIR/stage"
    RUN_HOST=$RUN_DIR
    vm_start "$RUN_DIR" 0
}

# run_end: however the run ends, its processes inside and its files are gone; a kept host that may not be as
# it was goes too.
run_end() {
    [ -z "$RUN_MIRROR" ] || kill_tree "$RUN_MIRROR"
    if [ "$RUN_HOST" = "$RUN_DIR" ]; then
        vm_end "$RUN_DIR"
    elif [ -n "$RUN_HOST" ] && [ -n "$WARM_LOCK" ]; then
        if [ -e "$RUN_HOST/room" ] && ! warm_close "$RUN_HOST"; then warm_discard "$RUN_HOST"; fi
        warm_unlock
    fi
    rm -rf -- "$RUN_DIR"
}

bring_copy() {
    local copy=$1 cwd=$2 name=${1#*:} file=${1%%:*}
    [ -e "$file" ] || die "--add $file: no such file or directory"
    [ "$name" != "$copy" ] || name=$file
    case $name in
    /*) ;;
    *) name=$cwd/$name ;;
    esac
    bring_in "$file" "$(realpath -ms -- "$name")"
}

# bring_in FILE NAME: FILE, or all that is below it, on the disk under the path NAME.
bring_in() {
    local file=$1 name=$2 stage=$RUN_DIR/stage program
    # The working directory is there, and has what was brought before.
    [ ! -f "$stage/fs$name" ] || return 0
    if [ -d "$file" ]; then
        mkdir -p "$stage/fs$name"
        # Links where that is possible: nothing is changed in the stage.
        cp -al -- "$(realpath -- "$file")/." "$stage/fs$name/" 2>/dev/null ||
            cp -a --sparse=always -- "$(realpath -- "$file")/." "$stage/fs$name/"
        printf '%s\n' "$name" >>"$stage/.emuhost/dirs"
        (cd -- "$file" && find . -type f -printf "%T@ %s $name/%P\n" | sed 's/^\([0-9]*\)\.[0-9]*/\1/') >>"$RUN_DIR/brought"
        while IFS= read -r program; do
            stage_libraries "$stage" "$program"
        done < <(find "$(realpath -- "$file")" -type f -perm /111 -size -256M | head -n 50)
        return
    fi
    place "$file" "$stage/fs$name"
    dirname -- "$name" >>"$stage/.emuhost/dirs"
    printf '%s %s\n' "$(stat -L -c '%Y %s' -- "$file")" "$name" >>"$RUN_DIR/brought"
    [ ! -x "$file" ] || stage_libraries "$stage" "$file"
}

run_inside() {
    local cwd=$1 limit=${LIMIT_SECONDS:-900} status=0
    follow &
    RUN_MIRROR=$!
    vm_exec "$RUN_HOST" auto "$limit" "$cwd" "${REST[@]}" || status=$?
    kill_tree "$RUN_MIRROR"
    RUN_MIRROR=''
    if ! vm_alive "$RUN_HOST"; then
        say "files changed inside are not brought back"
        return "$status"
    fi
    bring_back || status=$STATUS_EMULATOR
    return "$status"
}

# may_come_back NAME: whether a path of inside is one that the run may change here: below the directories that
# it was given.
may_come_back() {
    local dir
    case $1 in */../* | */.. | *$'\n'*) return 1 ;; esac
    while IFS= read -r dir; do
        case $1 in "${dir%/}"/?*) return 0 ;; esac
    done <"$RUN_DIR/dirs"
    return 1
}

# follow: what the files that the command makes grow by, while it runs (host/emuhost-watch).
follow() {
    local bytes from name part
    trap - EXIT
    vm_session "$RUN_HOST" -- "$(in_room "$RUN_HOST" /usr/bin/emuhost-watch)" </dev/null 2>/dev/null |
        while read -r bytes from name; do
            name=${name#.}
            part=$RUN_DIR/part
            head -c "$bytes" >"$part"
            [ "$(stat -c %s "$part")" = "$bytes" ] && may_come_back "$name" || continue
            mkdir -p "$(dirname -- "$name")"
            if [ "$from" = 0 ]; then
                # In its place: somebody may be following it.
                cat "$part" >"$name"
            elif [ "$(stat -c %s -- "$name" 2>/dev/null)" = "$from" ]; then
                cat "$part" >>"$name"
            fi
        done
}

# bring_back: what the command has changed or made. The list is made inside; the bytes are read from the
# unmounted disk, which is much faster than through the emulated network.
bring_back() {
    local seconds bytes name wrong=''
    vm_session "$RUN_HOST" -- "$(in_room "$RUN_HOST" /bin/sh -c 'cd /data/fs && find . -type f -exec stat -c "%Y %s %n" {} +')" \
        </dev/null >"$RUN_DIR/after" || return
    sed -i 's| \./| /|' "$RUN_DIR/after"
    ! cmp -s <(sort "$RUN_DIR/after") <(sort "$RUN_DIR/brought") || return 0
    if [ "$RUN_HOST" = "$RUN_DIR" ]; then vm_stop "$RUN_DIR"; else warm_close "$RUN_HOST" || return; fi
    while read -r seconds bytes name; do
        ! grep -qxF -- "$seconds $bytes $name" "$RUN_DIR/brought" || continue
        may_come_back "$name" || { say "warning: $name is not brought back: it is below no directory that was brought in"; continue; }
        fetch "$bytes" "$name" || { say "error: $name could not be brought back"; wrong=yes; }
    done <"$RUN_DIR/after"
    [ -z "$wrong" ]
}

# fetch BYTES NAME: NAME from the disk, complete or not at all; the holes stay holes.
fetch() {
    local bytes=$1 name=$2 target part
    need debugfs e2fsprogs
    target=$(realpath -m -- "$name")
    mkdir -p "$(dirname -- "$target")"
    part=$(mktemp "$(dirname -- "$target")/.emuhost.XXXXXX")
    truncate -s "$bytes" "$part"
    debugfs -R "cat \"/fs$name\"" "$RUN_DIR/disk.img" 2>/dev/null | dd of="$part" bs=64K conv=sparse,notrunc iflag=fullblock status=none ||
        { rm -f -- "$part"; return 1; }
    [ "$(stat -c %s "$part")" = "$bytes" ] || { rm -f -- "$part"; return 1; }
    if [ -e "$target" ]; then
        # What has come while the command ran is there already, perhaps with somebody who follows it.
        if [ "$bytes" -lt 33554432 ] && cmp -s -- "$part" "$target"; then
            rm -f -- "$part"
            return
        fi
        chmod --reference="$target" "$part"
    else
        chmod "$(printf '%o' $((0666 & ~0$(umask))))" "$part"
    fi
    mv -f -- "$part" "$target"
}
