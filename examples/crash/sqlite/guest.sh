#!/bin/sh
# Inserts 12 rows by SQLite, a transaction each, and promises each once COMMIT has returned; the guest's part of "A
# database" in examples/crash/README.md.
# usage: guest.sh DELETE|WAL OFF|NORMAL|FULL|EXTRA [DEVICE]
#        guest.sh promise DEVICE NUMBER
set -eu

# As in ../rename/guest.sh: stable on the same disk, behind the file system, before anybody is told.
if [ "$1" = promise ]; then
    printf '%-4096s' "$3" | dd of="$2" bs=4096 seek=14336 oflag=direct conv=notrunc,fsync 2>/dev/null
    echo "saved $3"
    exit
fi
journal=$1 synchronous=$2 device=${3:-/dev/vda}

transactions() {
    # A cache of few pages, and checkpoints after few: more of what can go wrong in a short run.
    cat <<SQL
.bail on
PRAGMA journal_mode=$journal;
PRAGMA synchronous=$synchronous;
PRAGMA wal_autocheckpoint=10;
PRAGMA cache_size=4;
CREATE TABLE row (number INTEGER PRIMARY KEY, text TEXT);
CREATE INDEX by_text ON row (text);
.system sh $0 promise $device 0
SQL
    for number in 1 2 3 4 5 6 7 8 9 10 11 12; do
        cat <<SQL
BEGIN;
INSERT INTO row VALUES ($number, replace(hex(zeroblob(400)), '00', printf('%05d', $number)));
COMMIT;
.system sh $0 promise $device $number
SQL
        # Something else on this machine calls sync(2): files reach the disk without SQLite's doing.
        [ $((number % 4)) -ne 0 ] || echo ".system sync"
    done
}

directory=$(mktemp -d)
mount -t ext4 "$device" "$directory"
transactions | sqlite3 "$directory/data/rows.db"
umount "$directory"
