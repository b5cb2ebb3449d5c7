# shellcheck shell=bash
# One emulated host in a directory: its disk, its emulator, its watchdog, its end.
# Owns the files of DIR:
#   disk.img   its ext4 disk              pid, port   of the running emulator
#   key        the throw-away ssh key     control     the directory of the shared ssh connection
#   heartbeat  a line every 2 s           why         why it ended
#   console.log, qemu.log
#   monitor.in, monitor.out               the emulator's monitor, of a host that serves runs (emuhost-warm.sh)

START_SECONDS_MAX=120
# Two busy CPUs that emulate can starve a heartbeat for a while; a minute is no longer load.
HEARTBEAT_SECONDS_MAX=60

host_build() {
    case $HOST_KERNEL in
    6.12) HOST_BUILD=$BUILD_DIR/host ;;
    6.1 | backports) HOST_BUILD=$BUILD_DIR/host-$HOST_KERNEL ;;
    *) usage_error "--kernel $HOST_KERNEL (or EMUHOST_KERNEL): 6.12, 6.1 or backports" ;;
    esac
    if [ ! -e "$HOST_BUILD/manifest" ]; then
        say "building the emulated host (once)"
        "$IMAGES_DIR/build-host" "$HOST_KERNEL" || exit "$STATUS_EMULATOR"
    elif ! grep -qsx "scripts $(host_scripts)" "$HOST_BUILD/manifest"; then
        say "building the emulated host again: it is of another version of minivmm"
        "$IMAGES_DIR/build-host" "$HOST_KERNEL" || exit "$STATUS_EMULATOR"
    fi
    QEMU_DIR=$(cat "$HOST_BUILD/qemu")
    if [ "$QEMU_DIR" != installed ] && [ ! -x "$QEMU_DIR/usr/bin/qemu-system-x86_64" ]; then
        say "the unpacked emulator has left the cache, building again"
        "$IMAGES_DIR/build-host" "$HOST_KERNEL" || exit "$STATUS_EMULATOR"
        QEMU_DIR=$(cat "$HOST_BUILD/qemu")
    fi
}

# place SOURCE TARGET: SOURCE under the name TARGET, without copying bytes where that is possible.
place() {
    mkdir -p "$(dirname -- "$2")"
    if [ -d "$1" ]; then
        cp -a --sparse=always -- "$1" "$2"
        return
    fi
    # A hard link would pin the file for the while only; a copy keeps holes and the time.
    ln -- "$(realpath -- "$1")" "$2" 2>/dev/null ||
        cp -L --preserve=timestamps,mode --reflink=auto --sparse=always -- "$1" "$2"
}

find_binary() {
    local candidate top=$IMAGES_DIR/..
    [ "$BINARY" != none ] || { BINARY=''; return; }
    if [ -n "$BINARY" ]; then
        [ -x "$BINARY" ] || die "--binary $BINARY: no such program"
        return
    fi
    for candidate in "$top/target/release/minivmm" "$top/target/debug/minivmm"; do
        [ -x "$candidate" ] || continue
        BINARY=$candidate
        return
    done
}

# stage_libraries STAGE PROGRAM: shared libraries of PROGRAM that the emulated host does not have.
stage_libraries() {
    local stage=$1 program=$2 soname path
    mkdir -p "$stage/lib"
    # ldd fails on a static program, which needs none.
    { ldd "$program" 2>/dev/null || true; } | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' |
        while read -r soname path; do
            # Another program that is brought in may have brought it.
            grep -qxF -- "$soname" "$HOST_BUILD/sonames" || [ -e "$stage/lib/$soname" ] ||
                place "$path" "$stage/lib/$soname"
        done
}

# stage_common STAGE: what every emulated host has on its disk.
stage_common() {
    local stage=$1
    stage_binary "$stage"
    stage_guests "$stage"
}

# stage_binary STAGE: the program, and the directories that a disk at /data has.
stage_binary() {
    local stage=$1
    mkdir -p "$stage/.emuhost" "$stage/bin" "$stage/guest" "$stage/lib"
    : >"$stage/.emuhost/dirs"
    : >"$stage/.emuhost/brought"
    find_binary
    if [ -n "$BINARY" ]; then
        place "$BINARY" "$stage/bin/minivmm"
        stage_libraries "$stage" "$BINARY"
        # What minivmm hands over to lies beside it.
        if [ -x "$BINARY-tools" ]; then
            place "$BINARY-tools" "$stage/bin/minivmm-tools"
            stage_libraries "$stage" "$BINARY-tools"
        fi
    fi
}

# guest_files: the guests' images that are built, below $BUILD_DIR.
guest_files() {
    local name file
    for name in . 6.12 6.1 small own; do
        for file in vmlinuz bzImage vmlinux initrd.cpio modules.cpio; do
            [ ! -e "$BUILD_DIR/$name/$file" ] || printf '%s\n' "$name/$file"
        done
    done
}

stage_guests() {
    local stage=$1 file
    guest_files | while read -r file; do place "$BUILD_DIR/$file" "$stage/guest/$file"; done
}

# vm_create DIR: the disk with its contents, unless DIR has one already.
vm_create() {
    local dir=$1 copy name stage
    host_build
    mkdir -p "$dir"
    if [ "$(vm_state "$dir")" = running ]; then die "$dir: an emulated host is running there already"; fi
    [ ! -e "$dir/disk.img" ] || return 0
    need mke2fs e2fsprogs
    need ssh-keygen openssh-client
    stage=$dir/stage
    rm -rf "$stage"
    stage_common "$stage"
    for copy in "${COPIES[@]}"; do
        name=${copy#*:}
        [ "$name" != "$copy" ] || name=${copy##*/}
        [ -e "${copy%%:*}" ] || die "--put ${copy%%:*}: no such file"
        place "${copy%%:*}" "$stage/$name"
    done
    vm_disk "$dir" "$stage"
}

# vm_disk DIR STAGE: makes DIR/disk.img of STAGE and the ssh key; STAGE is gone afterwards.
vm_disk() {
    local dir=$1 stage=$2
    rm -f "$dir/key" "$dir/key.pub"
    ssh-keygen -q -t ed25519 -N '' -C emuhost -f "$dir/key"
    cp "$dir/key.pub" "$stage/.emuhost/authorized_keys"
    chmod 600 "$stage/.emuhost/authorized_keys"
    # Without a label, a check interval or blocks that only root may fill.
    mke2fs -q -F -t ext4 -m 0 -E root_owner=0:0 -d "$stage" "$dir/disk.part" "$DISK_SIZE" >/dev/null
    rm -rf "$stage"
    mv "$dir/disk.part" "$dir/disk.img"
}

vm_start() {
    local dir=$1 life_seconds=$2 _
    dir=$(realpath -- "$dir")
    if [ -n "$LOG_WRITES" ]; then
        cp --sparse=always -- "$dir/disk.img" "$LOG_WRITES.base"
        : >"$LOG_WRITES"
    fi
    for _ in 1 2 3 4 5; do
        rm -f "$dir"/{pid,port,why,heartbeat,console.log,qemu.log,killed,stopped}
        # Below the range that the kernel itself takes ports from; a taken one is tried again.
        printf '%s\n' $((20000 + (RANDOM * 32768 + RANDOM) % 12000)) >"$dir/port"
        : >"$dir/heartbeat"
        (
            export HOST_BUILD QEMU_DIR MEMORY_MIB CPUS DISK_CACHE LOG_WRITES WARM_FILE
            # The lock of a warm host is the run's, not the emulator's.
            [ -z "${WARM_LOCK:-}" ] || exec {WARM_LOCK}>&-
            setsid "$IMAGES_DIR/emuhost" _supervise "$dir" "$life_seconds" </dev/null >/dev/null 2>>"$dir/qemu.log" &
        )
        if vm_wait_ready "$dir"; then
            vm_connect "$dir"
            return
        fi
        grep -qs 'Could not set up host forwarding' "$dir/qemu.log" || break
    done
    say "error: the emulated host did not start: $(cat "$dir/why" 2>/dev/null || echo 'no answer')"
    tail -n 5 "$dir/qemu.log" "$dir/console.log" >&2 2>/dev/null || true
    vm_end "$dir"
    exit "$STATUS_EMULATOR"
}

vm_wait_ready() {
    local dir=$1 deadline=$((SECONDS + START_SECONDS_MAX))
    while [ $SECONDS -lt $deadline ]; do
        ! grep -qsa '^ready' "$dir/heartbeat" || return 0
        if [ -e "$dir/why" ]; then return 1; fi
        sleep 0.1
    done
    echo "not ready after $START_SECONDS_MAX s" >"$dir/why"
    return 1
}

# vm_supervise DIR LIFE_SECONDS: runs the emulator and watches its heartbeat, in the background.
vm_supervise() {
    local dir=$1 deadline=$((SECONDS + $2)) life=$2 qemu age status=0
    [ "$life" -gt 0 ] || deadline=$((SECONDS + 31536000))
    (vm_qemu "$dir") &
    qemu=$!
    printf '%s\n' "$qemu" >"$dir/pid.part"
    mv "$dir/pid.part" "$dir/pid"
    trap 'kill -KILL "$qemu" 2>/dev/null' EXIT
    while kill -0 "$qemu" 2>/dev/null; do
        age=$(($(date +%s) - $(stat -c %Y "$dir/heartbeat" 2>/dev/null || echo 0)))
        if [ ! -d "$dir" ]; then
            break
        elif [ "$age" -gt "$HEARTBEAT_SECONDS_MAX" ] && grep -qsa '^ready' "$dir/heartbeat"; then
            echo "hung: no heartbeat for $age s" >"$dir/why"
            break
        elif [ $SECONDS -ge $deadline ]; then
            echo "its time of $life s was over" >"$dir/why"
            break
        elif [ -n "${WARM_FILE:-}" ] && warm_is_over "$dir" "$WARM_FILE"; then
            # The lock is ours now, so no run has the host, and none gets it before it is gone.
            kill -KILL "$qemu" 2>/dev/null || true
            warm_discard "$dir"
            break
        fi
        sleep 1 &
        # Whichever ends first, the second or the emulator; a stop is then seen at once.
        wait -n "$qemu" $! || true
    done
    kill -KILL "$qemu" 2>/dev/null || true
    wait "$qemu" || status=$?
    [ ! -d "$dir" ] || [ -e "$dir/why" ] || vm_say_why "$dir" "$status"
}

vm_say_why() {
    local dir=$1 status=$2 reported
    reported=$(sed -n 's/^failed: //p' "$dir/heartbeat")
    if [ -n "$reported" ]; then
        echo "$reported" >"$dir/why"
    elif [ -e "$dir/killed" ]; then
        echo "killed on request" >"$dir/why"
    elif [ -e "$dir/stopped" ]; then
        echo "stopped on request" >"$dir/why"
    else
        echo "the emulator ended with status $status" >"$dir/why"
    fi
}

vm_qemu() {
    local dir=$1 disk
    disk=file=${dir//,/,,}/disk.img,format=raw,if=none,id=disk,cache=$DISK_CACHE,discard=unmap
    if [ -n "$LOG_WRITES" ]; then
        # Each entry counts at once: the emulator may be killed at any moment. A flush is recorded when it
        # has ended, and what ended meanwhile would pass for flushed: so here it takes no time (no-flush),
        # and its entry stands where it was asked for. It is the log that tells what is stable; this
        # machine's page cache outlives the emulator.
        disk=driver=blklogwrites,if=none,id=disk,cache=$DISK_CACHE,log-super-update-interval=1
        disk+=,file.driver=file,file.filename=${dir//,/,,}/disk.img,file.discard=unmap,file.cache.no-flush=on
        disk+=,log.driver=file,log.filename=${LOG_WRITES//,/,,},log.cache.no-flush=on
    fi
    # Debian's cloud kernel takes the network addresses it is given; nothing but the ssh port on
    # 127.0.0.1 reaches in, and nothing gets out (restrict).
    local -a monitor=()
    [ ! -p "$dir/monitor.in" ] || monitor=(-chardev "pipe,id=monitor,path=${dir//,/,,}/monitor" -mon "chardev=monitor,mode=readline")
    qemu_exec -name emuhost "${monitor[@]}" -accel tcg,thread=multi -cpu max,xlevel=0x8000001e \
        -smp "$CPUS" -m "$MEMORY_MIB" -display none -nodefaults -no-user-config -no-reboot \
        -serial "file:$dir/console.log" -serial "file:$dir/heartbeat" \
        -kernel "$HOST_BUILD/vmlinuz" -initrd "$HOST_BUILD/initrd.cpio" \
        -append "console=ttyS0 reboot=k panic=-1 quiet" \
        -drive "$disk" \
        -device virtio-blk-pci,drive=disk \
        -netdev "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:$(cat "$dir/port")-:22" \
        -device virtio-net-pci,netdev=net,romfile= >>"$dir/qemu.log" 2>&1
}

vm_alive() { [ -e "$1/pid" ] && kill -0 "$(cat "$1/pid")" 2>/dev/null && [ ! -e "$1/why" ]; }

vm_state() {
    if vm_alive "$1"; then
        echo running
    elif [ -e "$1/why" ]; then
        case $(cat "$1/why") in
        hung*) echo hung ;;
        stopped*) echo stopped ;;
        *) echo killed ;;
        esac
    else
        echo stopped
    fi
}

vm_status() {
    local state
    state=$(vm_state "$1")
    echo "$state"
    [ "$state" = running ]
}

# vm_wait_end DIR SECONDS: waits for the supervisor to have written why.
vm_wait_end() {
    local deadline=$((SECONDS + $2))
    until [ -e "$1/why" ]; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.1
    done
}

# vm_end DIR: no emulator and no connection afterwards, whatever the state was.
vm_end() {
    local dir=$1
    if [ -e "$dir/pid" ] && [ ! -e "$dir/why" ]; then
        kill -KILL "$(cat "$dir/pid")" 2>/dev/null || true
        vm_wait_end "$dir" 10 || true
    fi
    vm_disconnect "$dir"
}

vm_kill() {
    [ -e "$1/disk.img" ] || die "$1 holds no emulated host"
    touch "$1/killed"
    vm_end "$1"
}

vm_stop() {
    local dir=$1
    vm_alive "$dir" || { vm_end "$dir"; return; }
    touch "$dir/stopped"
    vm_session "$dir" -- 'sync; cd /; umount -a -r; umount /data || mount -o remount,ro /data; poweroff -f' \
        </dev/null >/dev/null 2>&1 || true
    vm_wait_end "$dir" 30 || warn "the emulated host did not switch off in 30 s, ending it"
    vm_end "$dir"
}
