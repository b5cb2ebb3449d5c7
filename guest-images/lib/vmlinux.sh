# shellcheck shell=bash
# The ELF image inside a bzImage. Sourced after common.sh.
# Owns where it lies (boot.rst: payload_offset, payload_length) and with what it is packed. A guest
# that starts from it has nothing to unpack, which is the longest part of a bzImage's boot.

# vmlinux_unpack IMAGE OUT: 1, and no OUT, where IMAGE holds none that can be unpacked here.
vmlinux_unpack() {
    local image=$1 out=$2 sectors offset length bytes unpack
    [ "$(vmlinux_hex "$image" 0x202 4)" = 48647253 ] || return 1
    sectors=$(vmlinux_number "$image" 0x1f1 1)
    # The offset counts from the protected-mode code, behind the boot sector and the setup sectors.
    offset=$(((${sectors/#0/4} + 1) * 512 + $(vmlinux_number "$image" 0x248 4)))
    length=$(vmlinux_number "$image" 0x24c 4)
    [ "$length" -gt 8 ] || return 1
    case $(vmlinux_hex "$image" "$offset" 4) in
    28b52ffd) unpack=(zstd -qdc) ;;
    02214c18) unpack=(lz4 -qdc) ;;
    1f8b*) unpack=(gzip -qdc) ;;
    fd377a58) unpack=(xz -qdc) ;;
    *) return 1 ;;
    esac
    need "${unpack[0]}" "${unpack[0]/#xz/xz-utils}"
    # The last four bytes of the payload are its unpacked length, which gzip's own format ends with too.
    bytes=$(vmlinux_number "$image" $((offset + length - 4)) 4)
    [ "${unpack[0]}" = gzip ] || length=$((length - 4))
    dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count="$length" status=none |
        "${unpack[@]}" >"$out.part" || { rm -f "$out.part"; return 1; }
    if [ "$(stat -c %s "$out.part")" != "$bytes" ] || [ "$(vmlinux_hex "$out.part" 0 4)" != 7f454c46 ]; then
        rm -f "$out.part"
        return 1
    fi
    mv -- "$out.part" "$out"
}

# vmlinux_number IMAGE OFFSET BYTES, vmlinux_hex IMAGE OFFSET BYTES: what stands there.
vmlinux_number() { od -An -v -t "u$3" --endian=little -j "$(($2))" -N "$3" -- "$1" | tr -d ' \n'; }
vmlinux_hex() { od -An -v -t x1 -j "$(($2))" -N "$3" -- "$1" | tr -d ' \n'; }
