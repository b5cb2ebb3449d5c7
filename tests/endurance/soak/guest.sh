# The guest's side: on each disk fio verifies what it has written, a part of it that always fails is read, and
# after a while records say what is written and flushed. Requests that overlap are never in flight together: their
# order is nobody's promise, and a short write that is continued behind another one would be taken for corruption.
until=$1
part_mib=@PART_MIB@
for disk in vda vdb vdc vdd; do
    fio --name=soak --filename=/dev/$disk --size=${part_mib}M --rw=randrw --rwmixread=30 --bsrange=4k-64k \
        --direct=1 --ioengine=libaio --iodepth=8 --fdatasync=64 --verify=crc32c --verify_fatal=1 --verify_backlog=128 \
        --norandommap --serialize_overlap=1 --randrepeat=0 --time_based --runtime=86400 >/tmp/fio.$disk 2>&1 || {
        echo "failed fio $disk: $(tr '\n' ' ' </tmp/fio.$disk | head -c 600)"
    } &
done
echo begun
(
    sleep @RECORDS_AFTER@
    for disk in vda vdb vdc vdd; do
        records /dev/$disk 16 86400 ${part_mib} | while read -r line; do echo "$disk $line"; done &
    done
    wait
) &
while :; do
    sleep 5
    for disk in vda vdb vdc vdd; do
        if dd if=/dev/$disk of=/dev/null bs=4k skip=@BAD_BLOCK@ count=1 iflag=direct 2>/dev/null; then
            echo "failed $disk: a read that must fail has succeeded"
        else
            echo "refused $disk"
        fi
    done
done
