# shellcheck shell=bash
# Emulated hosts that are kept for a while, so that `run` need not boot one. Owns which host serves a run, the
# run's own disk in it, and the end of hosts that nobody uses.
#
# A host is in a slot, a directory of $WARM_DIR, and serves one run at a time: whoever holds the lock SLOT.lock.
#   key    what it was made of: a run takes a host with the key that it would make one of
#   used   its time is that of the last use
#   room   a run is in it; left behind by a run that was killed, it makes the host useless
# Each run has a disk of its own, plugged in and out by the emulator's monitor (host/emuhost-room).

WARM_SLOTS=4
# Unused for so long, it ends; and so old, it is not used again.
WARM_SECONDS=${EMUHOST_KEEP_SECONDS:-600}
WARM_AGE_SECONDS_MAX=7200
# What a warm host answers in; a hung one is thrown away.
WARM_ANSWER_SECONDS_MAX=15
WARM_LOCK=''

# warm_state: sets WARM_DIR, this user's own directory.
warm_state() {
    local owner
    WARM_DIR=${TMPDIR:-/var/tmp}/emuhost-$(id -u)
    mkdir -m 700 -- "$WARM_DIR" 2>/dev/null || true
    owner=$(stat -c '%u %a %F' -- "$WARM_DIR" 2>/dev/null || true)
    [ "$owner" = "$(id -u) 700 directory" ] ||
        die "$WARM_DIR is not a directory of yours alone (it is: ${owner:-missing}): remove it, or set TMPDIR"
}

# warm_key: what a host that serves these options is made of.
warm_key() {
    local file
    printf '%s\n' "$HOST_KERNEL" "$MEMORY_MIB" "$CPUS" "$DISK_CACHE" "$HOST_BUILD"
    sha256_of "$HOST_BUILD/manifest"
    guest_files | while read -r file; do stat -L -c '%n %s %Y' -- "$BUILD_DIR/$file"; done
}

# warm_lock SLOT: takes the slot's lock; 1 where somebody has it.
warm_lock() {
    exec {WARM_LOCK}>"$WARM_DIR/$1.lock"
    flock -n "$WARM_LOCK" && return
    warm_unlock
    return 1
}

warm_unlock() {
    exec {WARM_LOCK}>&-
    WARM_LOCK=''
}

warm_age() { printf '%s\n' $(($(date +%s) - $(stat -c %Y -- "$1" 2>/dev/null || echo 0))); }

# warm_is_good DIR KEY: whether the host in DIR can serve a run. Its lock is ours.
warm_is_good() {
    local dir=$1
    vm_alive "$dir" && [ ! -e "$dir/room" ] && [ "$(cat "$dir/key" 2>/dev/null)" = "$2" ] &&
        [ "$(warm_age "$dir/key")" -lt "$WARM_AGE_SECONDS_MAX" ] || return 1
    timeout "$WARM_ANSWER_SECONDS_MAX" "$IMAGES_DIR/emuhost" exec --no-tty "$dir" -- true </dev/null >/dev/null 2>&1 && return
    say "the host that was kept does not answer; another one is started"
    return 1
}

# warm_discard DIR: ends the host in DIR, if any, and removes it.
warm_discard() {
    [ -d "$1" ] || return 0
    touch "$1/killed"
    vm_end "$1"
    rm -rf -- "$1"
}

# warm_take: sets WARM_HOST to a host for this run alone, started if need be; 1 where all slots are busy.
warm_take() {
    local slot key oldest='' age oldest_age=-1
    warm_state
    key=$(warm_key)
    for ((slot = 0; slot < WARM_SLOTS; slot++)); do
        [ -e "$WARM_DIR/$slot/key" ] && warm_lock "$slot" || continue
        if warm_is_good "$WARM_DIR/$slot" "$key"; then
            WARM_HOST=$WARM_DIR/$slot
            touch "$WARM_HOST/used"
            return
        fi
        # A host that is no good to anybody makes room.
        if ! vm_alive "$WARM_DIR/$slot" || [ -e "$WARM_DIR/$slot/room" ] || [ "$(cat "$WARM_DIR/$slot/key")" = "$key" ]; then
            warm_discard "$WARM_DIR/$slot"
        fi
        warm_unlock
    done
    # A free slot, or the one whose host with another key was unused for longest.
    for ((slot = 0; slot < WARM_SLOTS; slot++)); do
        warm_lock "$slot" || continue
        if [ ! -e "$WARM_DIR/$slot/key" ]; then
            warm_start "$WARM_DIR/$slot" "$key"
            return
        fi
        warm_unlock
        age=$(warm_age "$WARM_DIR/$slot/used")
        if [ "$age" -gt "$oldest_age" ]; then oldest=$slot oldest_age=$age; fi
    done
    if [ -n "$oldest" ] && warm_lock "$oldest"; then
        warm_start "$WARM_DIR/$oldest" "$key"
        return
    fi
    return 1
}

# warm_start DIR KEY: boots a host there that serves runs. Its lock is ours.
warm_start() {
    local dir=$1 key=$2 size=$DISK_SIZE log=$LOG_WRITES
    warm_discard "$dir"
    mkdir -m 700 -- "$dir"
    mkdir -p "$dir/stage/.emuhost"
    : >"$dir/stage/.emuhost/dirs"
    stage_guests "$dir/stage"
    DISK_SIZE=4G LOG_WRITES=''
    vm_disk "$dir" "$dir/stage"
    mkfifo "$dir/monitor.in" "$dir/monitor.out"
    WARM_FILE=$WARM_DIR/${dir##*/}.lock
    vm_start "$dir" 0
    WARM_FILE=''
    DISK_SIZE=$size LOG_WRITES=$log
    touch "$dir/used"
    printf '%s\n' "$key" >"$dir/key"
    WARM_HOST=$dir
}

# warm_is_over DIR LOCK_FILE: whether nobody has used the host for a while; its lock is then ours.
warm_is_over() {
    [ -e "$1/used" ] && [ "$(warm_age "$1/used")" -ge "$WARM_SECONDS" ] || return 1
    WARM_DIR=${2%/*}
    warm_lock "$(basename -- "$2" .lock)"
}

# warm_monitor DIR COMMAND: a line for the emulator's monitor, whose words go to qemu.log.
warm_monitor() {
    # Opened for both directions: nothing here waits for the emulator.
    printf '%s\n' "$2" 1<>"$1/monitor.in"
    sleep 0.1
    dd if="$1/monitor.out" iflag=nonblock bs=64K count=1 2>/dev/null >>"$1/qemu.log" || true
}

# warm_open DIR DISK: plugs DISK in as the disk of a run.
warm_open() {
    local dir=$1 disk=$2
    touch "$dir/room"
    warm_monitor "$dir" "drive_add 0 file=${disk//,/,,},format=raw,if=none,id=run,cache=$DISK_CACHE,discard=unmap"
    warm_monitor "$dir" "device_add virtio-blk-pci,drive=run,id=run,serial=run"
    vm_session "$dir" -- "/usr/bin/emuhost-room open" </dev/null
}

# warm_close DIR: ends what the run has left and plugs its disk out; 1 where the host is of no use afterwards.
warm_close() {
    local dir=$1
    vm_alive "$dir" || return
    timeout 30 "$IMAGES_DIR/emuhost" _room_close "$dir" </dev/null || return
    warm_monitor "$dir" "device_del run"
    touch "$dir/used"
    rm -f "$dir/room"
}

# warm_each FUNCTION: for every slot that has a host: FUNCTION DIR.
warm_each() {
    local slot
    warm_state
    for ((slot = 0; slot < WARM_SLOTS; slot++)); do
        [ ! -d "$WARM_DIR/$slot" ] || "$1" "$WARM_DIR/$slot"
    done
}

warm_describe() {
    local use=idle
    if warm_lock "${1##*/}"; then warm_unlock; else use='in use'; fi
    printf '%s: %s, %s, %s s since the last run began or ended\n' "$1" "$(vm_state "$1")" "$use" "$(warm_age "$1/used")"
}

warm_stop() {
    if warm_lock "${1##*/}"; then
        warm_discard "$1"
        warm_unlock
    else
        say "$1 is in use: not stopped"
        WARM_BUSY=yes
    fi
}

command_warm() {
    parse_options "$@"
    [ ${#REST[@]} -eq 0 ] || usage_error "warm takes options only"
    host_build
    warm_take || die "all $WARM_SLOTS kept hosts are in use"
    touch "$WARM_HOST/used"
    warm_unlock
    say "a host is ready for the next run, for $WARM_SECONDS s (emuhost stop --all ends it)"
}

command_stop_all() {
    WARM_BUSY=''
    warm_each warm_stop
    [ -z "$WARM_BUSY" ] || exit 1
}
