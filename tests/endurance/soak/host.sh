# The host's side of one cycle of tests/soak, in an empty directory with four images and the guest's files.
# $1: the guest's memory in MiB. $2: a limit on the host's memory in MiB, or empty. Standard input: lines
# "RUN STOP", seconds that minivmm runs and is then stopped. It writes what it sees to `seen`, and `ended` last.
memory=$1 limit=$2
set -- --memory "${memory}M" --stats=stats.json --add records:/usr/bin/records --add guest.sh:/soak/guest.sh
[ -z "$limit" ] || set -- "$@" --host-memory-limit "${limit}M"
while read -r disk; do set -- "$@" --disk "$disk"; done <disks
minivmm "$@" -- sh /soak/guest.sh >said 2>complaints </dev/null &
pid=$!
# What the program itself has in memory, in KiB, without the guest's; and its descriptors.
look() {
    own=$(awk -v ram=$((memory * 1024)) '/^Size:/ { size = $2 } /^Rss:/ && size != ram { sum += $2 } END { print sum }' \
        /proc/$pid/smaps 2>/dev/null)
    open=$(ls /proc/$pid/fd 2>/dev/null | wc -l)
    [ -z "$own" ] || echo "own $own open $open"
}
until grep -q '^begun' said 2>/dev/null || ! kill -0 $pid 2>/dev/null; do sleep 0.5; done
while read -r run stop; do
    sleep "$run"
    kill -STOP $pid || break
    sleep "$stop"
    kill -CONT $pid
    look
done >seen
kill -TERM $pid
wait $pid
echo "status $?" >>seen
: >ended
