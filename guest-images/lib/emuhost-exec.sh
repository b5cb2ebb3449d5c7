# shellcheck shell=bash
# Commands and files in a running emulated host, over ssh. Owns the shared connection, the passing
# of signals, exit status and terminals; the other end is host/emuhost-run.

SSH_OPTIONS=(-F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null
    -o LogLevel=ERROR -o IdentitiesOnly=yes -o IdentityAgent=none -o ConnectTimeout=60 -e none)

# quote WORD...: the words as a POSIX shell (busybox's) reads them back.
quote() {
    local word quoted=''
    for word in "$@"; do quoted+="'${word//\'/\'\\\'\'}' "; done
    printf '%s' "$quoted"
}

# vm_connect DIR: one connection for all sessions makes each of them cheap. Its socket is in a
# short path, since socket names are limited to about 100 bytes.
vm_connect() {
    local dir=$1 control
    control=$(mktemp -d /tmp/emuhost.XXXXXX)
    printf '%s\n' "$control" >"$dir/control"
    unlocked ssh "${SSH_OPTIONS[@]}" -i "$dir/key" -p "$(cat "$dir/port")" -o ControlMaster=yes -o ControlPath="$control/ssh" \
        -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -fN root@127.0.0.1 </dev/null >/dev/null 2>>"$dir/qemu.log" ||
        warn "no shared connection to the emulated host (see $dir/qemu.log); each command makes its own"
}

# unlocked COMMAND...: COMMAND without the lock of a warm host, which a process that stays would keep.
unlocked() {
    if [ -n "${WARM_LOCK:-}" ]; then
        "$@" {WARM_LOCK}>&-
    else
        "$@"
    fi
}

vm_disconnect() {
    local control
    [ -e "$1/control" ] || return 0
    control=$(cat "$1/control")
    [ ! -S "$control/ssh" ] || ssh -o ControlPath="$control/ssh" -O exit root@127.0.0.1 >/dev/null 2>&1 || true
    rm -rf -- "$control"
    rm -f "$1/control"
}

# vm_session DIR [SSH_OPTION...] -- COMMAND_LINE: one ssh session, read by busybox's shell.
vm_session() {
    local dir=$1
    local -a options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    ssh "${SSH_OPTIONS[@]}" -i "$dir/key" -p "$(cat "$dir/port")" \
        -o ControlPath="$(cat "$dir/control" 2>/dev/null)/ssh" "${options[@]}" root@127.0.0.1 "$@"
}

vm_require() {
    vm_alive "$1" && return
    say "error: no emulated host is running in $1: $(cat "$1/why" 2>/dev/null || echo 'never started')"
    exit "$STATUS_EMULATOR"
}

# vm_exec DIR TTY LIMIT_SECONDS CWD COMMAND...: returns the command's status.
vm_exec() {
    local dir=$1 tty=$2 limit=$3 cwd=$4 id=$$.$RANDOM mode=plain status=0 ssh_pid timer='' line out=1 err=2
    local -a relays=()
    shift 4
    vm_require "$dir"
    local -a option=(-T)
    if [ "$tty" = yes ] || { [ "$tty" = auto ] && [ -t 0 ] && [ -t 1 ]; }; then
        mode="tty"
        option=(-tt)
    else
        # A reader that goes away must be a broken pipe for the command, which ssh does not make it.
        if [ -p /dev/fd/1 ]; then
            mode+=,out
            exec {out}> >(relay "$dir" "$id.out")
            relays+=("$!")
        fi
        if [ -p /dev/fd/2 ]; then
            mode+=,err
            exec {err}> >(relay "$dir" "$id.err" >&2)
            relays+=("$!")
        fi
    fi
    line=$(in_room "$dir" /usr/bin/emuhost-run "$id" "$cwd" "$mode" "$@")
    TIMED_OUT=''
    trap 'vm_signal "$dir" "$id" INT' INT
    trap 'vm_signal "$dir" "$id" TERM' TERM
    trap 'vm_signal "$dir" "$id" HUP' HUP
    trap 'TIMED_OUT=yes; vm_signal "$dir" "$id" TERM; (sleep 10; vm_signal "$dir" "$id" KILL; sleep 5; kill "$ssh_pid") >/dev/null 2>&1 &' USR1
    # ssh runs beside us, so that our traps act at once. Its standard input is ours: a job of a
    # script would get /dev/null.
    vm_session "$dir" "${option[@]}" -- "$line" <&0 >&"$out" 2>&"$err" &
    ssh_pid=$!
    if [ "$limit" -gt 0 ]; then
        (
            trap - INT TERM HUP
            sleep "$limit" && kill -USR1 $$
        ) </dev/null >/dev/null 2>&1 &
        timer=$!
    fi
    # Their end is the end of what ssh writes.
    [ "$out" = 1 ] || exec {out}>&-
    [ "$err" = 2 ] || exec {err}>&-
    while :; do
        status=0
        wait "$ssh_pid" || status=$?
        # A trap ends wait early; only the end of ssh counts.
        kill -0 "$ssh_pid" 2>/dev/null || break
    done
    wait "$ssh_pid" 2>/dev/null || status=$?
    trap - USR1
    end_on_signals
    [ -z "$timer" ] || kill_tree "$timer"
    [ ${#relays[@]} -eq 0 ] || wait "${relays[@]}" 2>/dev/null || true
    vm_exec_status "$dir" "$id" "$status"
}

# relay DIR STREAM: passes a stream of the command on. Where nobody reads it any more, its way inside is
# cut, which the command sees as a broken pipe.
relay() {
    local status=0
    trap '' INT TERM HUP
    cat || status=$?
    [ "$status" != 0 ] || return 0
    vm_session "$1" -- "kill \$(cat /run/emuhost/$2)" </dev/null >/dev/null 2>&1 || true
    # What is still on its way is thrown away. If ssh met a broken pipe here, it would close the session, and what
    # the command still writes to its other stream would be lost.
    cat >/dev/null || true
}

# in_room DIR COMMAND...: the command line that runs COMMAND where the run that has DIR keeps its files.
in_room() {
    local dir=$1 room=''
    shift
    # shellcheck disable=SC2016  # the other shell expands it
    [ ! -e "$dir/room" ] || room='nsenter -t "$(cat /run/emuhost/room.pid)" -m '
    printf '%s%s' "$room" "$(quote "$@")"
}

kill_tree() {
    local child
    for child in $(ps -o pid= --ppid "$1" 2>/dev/null); do kill "$child" 2>/dev/null || true; done
    kill "$1" 2>/dev/null || true
}

# ssh says 255 for its own failures; whether the command ended so is known inside.
vm_exec_status() {
    local dir=$1 id=$2 status=$3 inner
    if [ -n "$TIMED_OUT" ]; then
        say "error: the command's time was over"
        return "$STATUS_TIMEOUT"
    fi
    [ "$status" = 255 ] || return "$status"
    if vm_alive "$dir" && inner=$(vm_session "$dir" -- "cat /run/emuhost/$id.status" 2>/dev/null </dev/null) && [ -n "$inner" ]; then
        return "$inner"
    fi
    vm_wait_end "$dir" 3 || true
    say "error: the emulated host was lost: $(cat "$dir/why" 2>/dev/null || echo 'the connection broke')"
    return "$STATUS_EMULATOR"
}

# vm_signal DIR ID SIGNAL: to the command, or to its group where it leads one. A signal that comes
# before the command has started waits for it.
vm_signal() {
    vm_session "$1" -- "for try in 1 2 3 4 5 6 7 8 9 10; do
        [ -s /run/emuhost/$2.pid ] && kill -s $3 -- \$(cat /run/emuhost/$2.pid) && break; sleep 0.2; done" \
        </dev/null >/dev/null 2>&1 || true
}

inside_path() {
    case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '/data/%s\n' "$1" ;;
    esac
}

vm_push() {
    local dir=$1 source=$2 target
    vm_require "$dir"
    target=$(inside_path "$3")
    [ -e "$source" ] || die "push: $source: no such file"
    case $target in */) target+=${source##*/} ;; esac
    tar -C "$(dirname -- "$(realpath -- "$source")")" -cSf - "$(basename -- "$(realpath -- "$source")")" |
        vm_session "$dir" -- "$(unpack_as "$target" "$(basename -- "$(realpath -- "$source")")")"
}

vm_pull() {
    local dir=$1 source target=$3
    vm_require "$dir"
    source=$(inside_path "$2")
    [ ! -d "$target" ] || target=$target/$(basename -- "$source")
    case $target in */) target+=$(basename -- "$source") ;; esac
    vm_session "$dir" -- "tar -C $(quote "$(dirname -- "$source")") -cSf - $(quote "$(basename -- "$source")")" </dev/null |
        sh -c "$(unpack_as "$target" "$(basename -- "$source")")"
}

# unpack_as TARGET NAME: the command that unpacks the one file or directory NAME and calls it TARGET.
unpack_as() {
    local target=$1 name=$2 dir
    dir=$(quote "$(dirname -- "$target")")
    # shellcheck disable=SC2016  # the other shell expands it
    printf 'set -e; mkdir -p %s; t=$(mktemp -d %s/.emuhost.XXXXXX); tar -C "$t" -xSf - --no-same-owner; rm -rf %s; mv "$t"/%s %s; rmdir "$t"' \
        "$dir" "${dir% }" "$(quote "$target")" "$(quote "$name")" "$(quote "$target")"
}

vm_ssh() {
    vm_exec "$1" yes 0 /data env ENV=/etc/shellrc busybox ash
}
