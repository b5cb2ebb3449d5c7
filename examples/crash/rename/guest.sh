#!/bin/sh
# Saves a file 12 times by writing a new one and renaming it over the old one; the guest's part of "A program that
# forgets fsync" in examples/crash/README.md.
# usage: guest.sh careless|file-only|right [DEVICE [MOUNT_OPTIONS]]
#   careless   syncs nothing
#   file-only  syncs the new file before the rename
#   right      syncs the new file before the rename, and the directory after it
set -eu
way=$1 device=${2:-/dev/vda} options=${3:-defaults}

# What a user would have read on the screen, kept where the check finds it: on the same disk, so that it is in the same
# log, behind the file system, and stable before anybody is told.
promise() {
    printf '%-4096s' "$1" | dd of="$device" bs=4096 seek=14336 oflag=direct conv=notrunc,fsync 2>/dev/null
    echo "saved $1"
}

save() {
    yes "version $1" | head -n 2000 >settings.new
    [ "$way" = careless ] || sync settings.new
    mv settings.new settings
    [ "$way" != right ] || sync .
}

directory=$(mktemp -d)
mount -t ext4 -o "$options" "$device" "$directory"
cd "$directory/data"
for version in 1 2 3 4 5 6 7 8 9 10 11 12; do
    save $version
    promise $version
    # Another program on the same disk, which has its reasons to sync: what it syncs commits ext4's journal for all.
    if [ $((version % 3)) -eq 0 ]; then
        echo "another program was here" >>journal
        sync journal
    fi
done
cd /
umount "$directory"
