#!/bin/sh
# Whether a disk of guest.sh beside this is good after a loss of power: the file is one whole version, and none older
# than what was promised.
# usage: check.sh IMAGE
set -u
PATH=$PATH:/usr/sbin:/sbin
image=$1

fail() {
    echo "$*"
    exit 1
}

# As at a boot: the journal is replayed.
said=$(e2fsck -p "$image" 2>&1)
[ $? -le 1 ] || fail "e2fsck -p: $said"

promised=$(dd if="$image" bs=4096 skip=14336 count=1 2>/dev/null | tr -d '\0 ')
promised=${promised:-0}
# "2000 version N" if all its lines are the same.
found=$(debugfs -R 'cat /data/settings' "$image" 2>/dev/null | tr '\0' 0 | uniq -c | sed 's/^ *//' | cut -c 1-60)
version=${found#2000 version }
case $version in
"") fail "promised: version $promised; settings is empty or missing" ;;
*[!0-9]*) fail "promised: version $promised; settings is no whole version: $found" ;;
esac
[ "$version" -ge "$promised" ] || fail "promised: version $promised; settings is version $version"
