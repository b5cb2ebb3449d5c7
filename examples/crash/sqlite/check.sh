#!/bin/sh
# Whether a disk of guest.sh beside this is good after a loss of power: the database is sound, and every row that was
# promised is in it, with no row before it missing.
# usage: check.sh IMAGE
set -u
PATH=$PATH:/usr/sbin:/sbin
image=$1

fail() {
    echo "$*"
    exit 1
}

# As at a boot: the journal of the file system is replayed.
said=$(e2fsck -p "$image" 2>&1)
[ $? -le 1 ] || fail "e2fsck -p: $said"
promised=$(dd if="$image" bs=4096 skip=14336 count=1 2>/dev/null | tr -d '\0 ')

# The database with what lies beside it: a rollback journal, a write-ahead log.
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
debugfs -R "rdump /data $directory" "$image" >/dev/null 2>&1
files=$(find "$directory/data" -type f -printf '%f\n' | sort | tr '\n' ' ')
ask() {
    sqlite3 -bail "$directory/data/rows.db" "$1" 2>&1
}

# The first to open it recovers it.
sound=$(ask 'PRAGMA integrity_check')
[ "$sound" = ok ] || fail "promised: row ${promised:-none}; integrity_check: $sound (files: ${files% })"
[ -n "$promised" ] || exit 0
rows=$(ask "SELECT count(*) || ' ' || coalesce(max(number), 0) FROM row
    WHERE text = replace(hex(zeroblob(400)), '00', printf('%05d', number))")
[ "${rows% *}" = "${rows#* }" ] || fail "promised: row $promised; rows and the last one: $rows (files: ${files% })"
[ "${rows% *}" -ge "$promised" ] || fail "promised: row $promised; the last one is row ${rows% *} (files: ${files% })"
