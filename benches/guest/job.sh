# What the guest does between boot and power-off: the jobs that stand behind this, one after another.
# Before each it says "@ ready" on the serial line and waits for a line, so that the host can bring
# its page cache into the wanted state; what fio says goes to the disk for results, JOB_BYTES each.
say() { echo "@ $*"; }
wait_for_host() {
    say "$@"
    read -r _
}
find_disk() {
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial")" != "$1" ] || echo "/dev/${disk##*/}"
    done
}
stty -echo
bench=$(find_disk bench)
results=$(find_disk results)
[ -b "$bench" ] && [ -b "$results" ] ||
    say "failed: the guest does not find its disks ($bench, $results) among $(echo /sys/block/vd*)"

# make_ext4 MIB: a file system with a file that is written from end to end, and nothing of it cached.
# Nothing is discarded: the image on the host must stay wholly written.
make_ext4() {
    mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$bench" && mount -t ext4 "$bench" /mnt &&
        dd if=/dev/urandom of=/mnt/file bs=1M count="$1" 2>/dev/null && sync &&
        echo 3 >/proc/sys/vm/drop_caches || say "failed: ext4 could not be made"
    file=/mnt/file
}

# job SLOT NAME OPTION...
job() {
    slot=$1 name=$2
    shift 2
    wait_for_host "ready $name"
    if fio --name=job --output-format=json --output=/tmp/answer --filename="$file" "$@" </dev/null >/tmp/complaint 2>&1; then
        dd if=/tmp/answer of="$results" bs="$JOB_BYTES" seek="$slot" conv=fsync 2>/dev/null && say "done $name"
    else
        say "failed: fio: $(cat /tmp/complaint /tmp/answer | tr '\n' ' ' | head -c 2000)"
    fi
}
file=$bench
