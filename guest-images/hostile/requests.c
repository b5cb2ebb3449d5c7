/* R10, R11, R19 to R22: requests that cannot be meant, and what they may do to the image. */
#include "attacks.h"

#define H { AT(&header), 16, 0 }
#define S { AT(&status[0]), 1, D_WRITE }
#define SCRATCH 64

/* R10 */
static void header_of_15(void) { put_header(IN, 3), CHAIN(table, { AT(&header), 15, 0 }, { AT(DATA), 512, D_WRITE }, S); }
static void no_header(void) { CHAIN(table, S); }
static void header_in_pieces(void)
{
	struct piece pieces[SMALL - 2];
	put_header(IN, 3);
	/* Ten pieces of one byte, and one of six. */
	for (u32 i = 0; i < 10; i++)
		pieces[i] = (struct piece){ AT(&header) + i, 1, 0 };
	pieces[10] = (struct piece){ AT(&header) + 10, 6, 0 };
	pieces[11] = (struct piece){ AT(DATA), 512, D_WRITE };
	pieces[12] = (struct piece){ AT(&status[0]), 1, D_WRITE };
	put_pieces(table, 0, pieces, 13);
}
static void data_behind_the_header(void)
{
	/* Header and data in one descriptor (virtio 2.7.4: no framing may be assumed). */
	struct header *at = (struct header *)DATA;
	*at = (struct header){ OUT, 0, SCRATCH };
	CHAIN(table, { AT(at), 16 + 512, 0 }, S);
}
static void status_behind_the_data(void)
{
	put_header(IN, 3);
	u8 *at = DATA;
	at[512] = UNTOUCHED;
	CHAIN(table, H, { AT(at), 513, D_WRITE });
	offer(0);
	kick();
	struct used_entry entry;
	if (!wait_used(&entry) || at[512] != S_OK || entry.length != 513)
		fail("a status in the data's descriptor is not served");
}
static void kinds_that_there_are_not(void)
{
	for (u32 bit = 0; bit < 32; bit++)
		for (u32 low = 0; low < 32; low++) {
			u32 kind = (bit >= 5 ? 1u << bit : 0) | low;
			bool is_known = kind == IN || kind == OUT || kind == FLUSH || kind == GET_ID || kind == DISCARD ||
					kind == WRITE_ZEROES;
			if (!is_known && !(transfer(kind, 3, DATA, 512) & (UNSUPP | IOERR)))
				fail("a request of no known type succeeds");
		}
}

/* R11, R22: the image neither grows nor changes. */
static void sector(u32 kind, u64 at, u32 bytes)
{
	put_header(kind, at);
	CHAIN(table, H, { AT(DATA), bytes, kind == IN ? D_WRITE : 0 }, S);
}
static void read_beyond(void) { sector(IN, capacity, 512); }
static void write_beyond(void) { sector(OUT, capacity, 512); }
static void read_across(void) { sector(IN, capacity - 1, 1024); }
static void write_across(void) { sector(OUT, capacity - 1, 1024); }
static void write_at_the_end_of_numbers(void) { sector(OUT, ~0ull, 512); }
static void bytes_that_wrap(void) { sector(OUT, (1ull << 55) + SCRATCH, 512); }
static void read_whose_bytes_wrap(void) { sector(IN, (1ull << 55) + 3, 512); }
static void sum_that_wraps(void) { sector(OUT, ~0ull - 1, 2048); }
static void no_whole_sector(void) { sector(OUT, SCRATCH, 511); }
static void read_of_one_byte(void) { sector(IN, 3, 1); }
static void no_data(void) { put_header(OUT, SCRATCH), CHAIN(table, H, S); }
static void no_data_beyond(void) { put_header(OUT, capacity + 1), CHAIN(table, H, S); }

/* R19: DISCARD and WRITE_ZEROES, whose segments are data: sector, sectors, flags. */
struct segment { u64 sector; u32 sectors, flags; };
static struct segment segments[128];

static void erase(u32 kind, struct segment one, u32 bytes)
{
	for (u32 at = 0; at < sizeof segments / sizeof *segments; at++)
		segments[at] = one;
	put_header(kind, 0);
	CHAIN(table, H, { AT(segments), bytes, 0 }, S);
}
#define ERASE(name, ...) \
	static void discard_##name(void) { erase(DISCARD, __VA_ARGS__); } \
	static void zero_##name(void) { erase(WRITE_ZEROES, __VA_ARGS__); }
ERASE(wraps, (struct segment){ ~0ull, 2, 0 }, 16)
ERASE(bytes_wrap, (struct segment){ 1ull << 55, 8, 0 }, 16)
ERASE(all_there_is, (struct segment){ 0, ~0u, 0 }, 16)
ERASE(across, (struct segment){ capacity - 1, 2, 0 }, 16)
ERASE(many, (struct segment){ SCRATCH, 8, 0 }, 128 * 16)
ERASE(no_segment, (struct segment){ 0 }, 0)
ERASE(half_a_segment, (struct segment){ SCRATCH, 8, 0 }, 8)
ERASE(one_and_a_half, (struct segment){ SCRATCH, 8, 0 }, 24)
ERASE(unknown_flags, (struct segment){ SCRATCH, 8, ~1u }, 16)

/* R20: wait_used() looks at each length; these are those where there is less room than data. */
static void serial_in_5_bytes(void) { put_header(GET_ID, 0), CHAIN(table, H, { AT(DATA), 5, D_WRITE }, S); }
static void serial_in_no_bytes(void) { put_header(GET_ID, 0), CHAIN(table, H, S); }
static void serial_in_a_megabyte(void) { put_header(GET_ID, 0), CHAIN(table, H, { AT(DATA), 1 << 20, D_WRITE }, S); }
static void nothing_leaks(void)
{
	/* What a failed read leaves is what was there, or the image's; never the host's memory. */
	u8 *data = DATA;
	for (u32 at = 0; at < 4096; at++)
		data[at] = 0x5a;
	if (transfer(IN, capacity - 1, data + 1, 1024) != IOERR)
		fail("a read across the end succeeds");
	for (u32 at = 0; at < 4096; at++)
		if (data[at] != 0x5a)
			fail("a read that failed has written");
}

/* R21: a header of a format that there is; the test boots the image again. */
static void header_of_qcow2(void)
{
	static const u8 magic[] = { 'Q', 'F', 'I', 0xfb, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 104, 0, 0, 0, 11 };
	u8 *data = DATA;
	for (u32 at = 0; at < 512; at++)
		data[at] = 0;
	for (u32 at = 0; at < sizeof magic; at++)
		data[at] = magic[at];
	for (u32 at = 0; at < 11; at++)
		data[104 + at] = (u8)"/etc/passwd"[at];
	if (transfer(OUT, 0, data, 512) != OK || transfer(FLUSH, 0, NULL, 0) != OK)
		fail("sector 0 cannot be written");
	for (u32 at = 0; at < 512; at++)
		data[at] = 0;
	if (transfer(IN, 0, data, 512) != OK || data[0] != 'Q' || data[104] != '/')
		fail("sector 0 is not what was written");
}

static const struct attack all[] = {
	{ "R10", "a header of 15 bytes", header_of_15, IOERR },
	{ "R10", "no header", no_header, IOERR },
	{ "R10", "a header in eleven pieces", header_in_pieces, OK },
	{ "R10", "data in the header's descriptor", data_behind_the_header, OK },
	{ "R10", "a status in the data's descriptor", status_behind_the_data, SELF },
	{ "R10", "a thousand types of no request", kinds_that_there_are_not, SELF },
	{ "R11", "a read beyond the end", read_beyond, IOERR },
	{ "R22", "a write beyond the end", write_beyond, IOERR },
	{ "R11", "a read across the end", read_across, IOERR },
	{ "R22", "a write across the end", write_across, IOERR },
	{ "R22", "a write at sector 2^64 - 1", write_at_the_end_of_numbers, IOERR },
	{ "R11", "a write whose bytes wrap into the image", bytes_that_wrap, IOERR },
	{ "R11", "a read whose bytes wrap into the image", read_whose_bytes_wrap, IOERR },
	{ "R11", "a write whose end wraps", sum_that_wraps, IOERR },
	{ "R11", "a write of 511 bytes", no_whole_sector, IOERR },
	{ "R11", "a read of one byte", read_of_one_byte, IOERR },
	{ "R11", "a write of no bytes", no_data, OK | IOERR },
	{ "R22", "a write of no bytes beyond the end", no_data_beyond, OK | IOERR },
	{ "R19", "a discard that wraps", discard_wraps, IOERR | UNSUPP },
	{ "R19", "zeroes that wrap", zero_wraps, IOERR | UNSUPP },
	{ "R19", "a discard whose bytes wrap", discard_bytes_wrap, IOERR | UNSUPP },
	{ "R19", "zeroes whose bytes wrap", zero_bytes_wrap, IOERR | UNSUPP },
	{ "R19", "a discard of 2^32 - 1 sectors", discard_all_there_is, IOERR | UNSUPP },
	{ "R19", "zeroes of 2^32 - 1 sectors", zero_all_there_is, IOERR | UNSUPP },
	{ "R19", "a discard across the end", discard_across, IOERR | UNSUPP },
	{ "R19", "zeroes across the end", zero_across, IOERR | UNSUPP },
	{ "R19", "a discard of 128 segments", discard_many, IOERR | UNSUPP },
	{ "R19", "zeroes of 128 segments", zero_many, IOERR | UNSUPP },
	{ "R19", "a discard of no segment", discard_no_segment, IOERR | UNSUPP },
	{ "R19", "zeroes of no segment", zero_no_segment, IOERR | UNSUPP },
	{ "R19", "a discard of half a segment", discard_half_a_segment, IOERR | UNSUPP },
	{ "R19", "zeroes of half a segment", zero_half_a_segment, IOERR | UNSUPP },
	{ "R19", "a discard of one segment and a half", discard_one_and_a_half, IOERR | UNSUPP },
	{ "R19", "zeroes of one segment and a half", zero_one_and_a_half, IOERR | UNSUPP },
	{ "R19", "a discard with unknown flags", discard_unknown_flags, IOERR | UNSUPP },
	{ "R19", "zeroes with unknown flags", zero_unknown_flags, IOERR | UNSUPP },
	{ "R20", "a serial into 5 bytes", serial_in_5_bytes, OK | IOERR },
	{ "R20", "a serial into no bytes", serial_in_no_bytes, OK | IOERR },
	{ "R20", "a serial into a megabyte", serial_in_a_megabyte, OK | IOERR },
	{ "R20", "a read that fails leaves nothing", nothing_leaks, SELF },
	{ "R21", "a qcow2 header with a backing file in sector 0", header_of_qcow2, SELF },
};
const struct attacks requests = { all, sizeof all / sizeof *all };
