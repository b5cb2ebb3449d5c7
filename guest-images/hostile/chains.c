/* R1 to R6, R9, R12: chains of descriptors that cannot be, and places that are none. */
#include "attacks.h"

#define H { AT(&header), 16, 0 }
#define S { AT(&status[0]), 1, D_WRITE }
#define READ_OF(...) put_header(IN, 3), CHAIN(table, H, __VA_ARGS__, S)
#define WRITE_OF(...) put_header(OUT, 64), CHAIN(table, H, __VA_ARGS__, S)

/* R1 */
static void own_next(void) { put(table, 0, AT(&header), 16, D_NEXT, 0); }
static void loop_of_two(void)
{
	put(table, 0, AT(&header), 16, D_NEXT, 1);
	put(table, 1, AT(DATA), 512, D_NEXT | D_WRITE, 0);
}
static void loop_in_a_table(void)
{
	put(indirect, 0, AT(&header), 16, D_NEXT, 1);
	put(indirect, 1, AT(DATA), 512, D_NEXT | D_WRITE, 1);
	put(table, 0, AT(indirect), 3 * 16, D_INDIRECT, 0);
}
static void loop_of_all(void)
{
	for (u16 at = 0; at < size; at++)
		put(table, at, AT(DATA), 1, D_NEXT | D_WRITE, (u16)((at + 1) % size));
}

/* R2 */
static void next_beyond(void) { put(table, 0, AT(&header), 16, D_NEXT, size); }
static void next_far_beyond(void) { put(table, 0, AT(&header), 16, D_NEXT, 0xffff); }
static void next_beyond_a_table(void)
{
	put(indirect, 0, AT(&header), 16, D_NEXT, 2);
	put(table, 0, AT(indirect), 2 * 16, D_INDIRECT, 0);
}

/* R3 */
static void read_to_registers(void) { READ_OF({ AT(place.device), 512, D_WRITE }); }
static void write_from_registers(void) { WRITE_OF({ AT(place.device), 512, 0 }); }
static void read_to_the_apic(void) { READ_OF({ 0xfee00000, 512, D_WRITE }); }
static void read_to_the_hole(void) { READ_OF({ 3ull << 30, 512, D_WRITE }); }
static void read_above_4g(void) { READ_OF({ 4ull << 30, 512, D_WRITE }); }
static void read_across_the_end(void) { READ_OF({ ram_end - 256, 512, D_WRITE }); }
static void write_across_the_end(void) { WRITE_OF({ ram_end - 256, 512, 0 }); }
static void read_that_wraps(void) { READ_OF({ ~0ull - 255, 512, D_WRITE }); }
static void write_that_wraps(void) { WRITE_OF({ ~0ull - 255, 512, 0 }); }
static void read_to_half_the_world(void) { READ_OF({ 1ull << 63, 512, D_WRITE }); }
static void half_outside(void) { READ_OF({ AT(DATA), 256, D_WRITE }, { ram_end, 256, D_WRITE }); }
static void header_outside(void) { CHAIN(table, { ram_end, 16, 0 }, S); }
static void header_across_the_end(void) { CHAIN(table, { ram_end - 8, 16, 0 }, S); }
static void header_that_wraps(void) { CHAIN(table, { ~0ull - 7, 16, 0 }, S); }
static void status_outside(void)
{
	put_header(IN, 3);
	CHAIN(table, H, { AT(DATA), 512, D_WRITE }, { ram_end, 1, D_WRITE });
}

/* R4 */
static void nothing_in_between(void)
{
	READ_OF({ AT(DATA), 0, D_WRITE }, { AT(DATA), 512, D_WRITE }, { ~0ull, 0, D_WRITE });
}
static void only_nothing(void) { CHAIN(table, { AT(&header), 0, 0 }, { AT(DATA), 0, D_WRITE }); }
static void one_nothing(void) { CHAIN(table, { 0, 0, 0 }); }

/* R5 */
static void over_4g(void) { WRITE_OF({ AT(DATA), ~0u, 0 }, { AT(DATA), ~0u, 0 }); }
static void read_over_4g(void) { READ_OF({ AT(DATA), ~0u, D_WRITE }, { AT(DATA), ~0u, D_WRITE }); }
static void one_of_4g(void) { WRITE_OF({ AT(DATA), ~0u, 0 }); }
static void sum_of_2_32(void)
{
	WRITE_OF({ AT(DATA), 1u << 31, 0 }, { AT(DATA), 1u << 31, 0 }, { AT(DATA), 512, 0 });
}
static void as_long_as_memory(void) { READ_OF({ 0, (u32)(ram_end - 1), D_WRITE }); }

/* R6 */
static void nested(void)
{
	put(table, 0, AT(indirect), 16, D_INDIRECT, 0);
	put(indirect, 0, AT(indirect), 16, D_INDIRECT, 0);
}
static void with_a_next(void) { put(table, 0, AT(indirect), 48, D_INDIRECT | D_NEXT, 1); }
static void of_24_bytes(void) { put(table, 0, AT(indirect), 24, D_INDIRECT, 0); }
static void of_nothing(void) { put(table, 0, AT(indirect), 0, D_INDIRECT, 0); }
static void longer_than_the_queue(void)
{
	put_header(IN, 3);
	put(indirect, 0, AT(&header), 16, D_NEXT, 1);
	put(indirect, 1, AT(DATA), 512, D_NEXT | D_WRITE, (u16)(4 * LARGE - 1));
	put(indirect, 4 * LARGE - 1, AT(&status[0]), 1, D_WRITE, 0);
	put(table, 0, AT(indirect), 16 * 4 * LARGE, D_INDIRECT, 0);
	writable_max = 513;
}
static void chain_longer_than_the_queue(void)
{
	put_header(IN, 3);
	put(indirect, 0, AT(&header), 16, D_NEXT, 1);
	for (u16 at = 1; at < size; at++)
		put(indirect, at, AT(DATA), 512, D_NEXT | D_WRITE, (u16)(at + 1));
	put(indirect, size, AT(&status[0]), 1, D_WRITE, 0);
	put(table, 0, AT(indirect), 16 * (size + 1u), D_INDIRECT, 0);
}
static void of_4g(void) { put(table, 0, AT(indirect), 0xfffffff0, D_INDIRECT, 0); }
static void table_outside(void) { put(table, 0, ram_end - 16, 32, D_INDIRECT, 0); }
static void table_that_wraps(void) { put(table, 0, ~15ull, 32, D_INDIRECT, 0); }
static void table_in_registers(void) { put(table, 0, AT(place.device), 48, D_INDIRECT, 0); }
static void after_the_header(void)
{
	put(table, 0, AT(&header), 16, D_NEXT, 1);
	put(table, 1, AT(indirect), 32, D_INDIRECT, 0);
	CHAIN(indirect, { AT(DATA), 512, D_WRITE }, S);
	put_header(IN, 3);
	writable_max = 513;
}
static void not_negotiated(void)
{
	start_with(SMALL, F_VERSION_1);
	put_header(IN, 3);
	CHAIN(indirect, H, { AT(DATA), 512, D_WRITE }, S);
	put(table, 0, AT(indirect), 48, D_INDIRECT, 0);
}

/* R9 */
static void writable_first(void) { CHAIN(table, H, S, { AT(DATA), 512, 0 }); }
static void writable_before_the_header(void) { CHAIN(table, { AT(DATA), 512, D_WRITE }, H, S); }
static void readable_status(void) { CHAIN(table, H, { AT(&status[0]), 1, 0 }); }
static void no_status(void) { CHAIN(table, H); }
static void read_into_readable(void) { put_header(IN, 3), CHAIN(table, H, { AT(DATA), 512, 0 }, S); }
static void write_from_writable(void) { put_header(OUT, 64), CHAIN(table, H, { AT(DATA), 512, D_WRITE }, S); }
static void flush_with_data(void) { put_header(FLUSH, 0), CHAIN(table, H, { AT(DATA), 512, 0 }, S); }
static void status_in_the_data(void)
{
	put_header(IN, 3);
	CHAIN(table, H, { AT(DATA), 512, D_WRITE }, { AT(DATA + 17), 1, D_WRITE });
	status[0] = S_OK;
}
static void status_in_the_header(void)
{
	put_header(IN, 3);
	CHAIN(table, H, { AT(DATA), 512, D_WRITE }, { AT(&header.kind), 1, D_WRITE });
	status[0] = S_OK;
}

/* R12: the device's own ends are what it writes to. After that, only a reset helps. */
static void onto_the_used_ring(void)
{
	READ_OF({ AT(&used), 512, D_WRITE });
	offer(0);
	kick();
	for (u64 since = rdtsc(); !is_over(since, 20);)
		pause();
}
static void onto_the_available_ring(void)
{
	READ_OF({ AT(&available), 512, D_WRITE });
	offer(0);
	kick();
	for (u64 since = rdtsc(); !is_over(since, 20);)
		pause();
}
static void onto_the_descriptors(void) { READ_OF({ AT(table), 512, D_WRITE }); }
static void onto_the_header(void) { READ_OF({ AT(&header), 512, D_WRITE }); }
static void writes_its_used_ring(void) { WRITE_OF({ AT(&used), 512, 0 }); }
static void onto_the_guest_itself(void)
{
	/* A copy of what is there already is read over the code that waits for it: bytes do not change. */
	u8 *code = (u8 *)(1u << 20);
	if (transfer(OUT, 65, code, 512) != OK)
		fail("the code cannot be written");
	put_header(IN, 65);
	CHAIN(table, H, { AT(code), 512, D_WRITE }, S);
}

static const struct attack all[] = {
	{ "R1", "a descriptor that is its own next", own_next, BROKEN },
	{ "R1", "a loop of two descriptors", loop_of_two, BROKEN },
	{ "R1", "a loop in an indirect table", loop_in_a_table, BROKEN },
	{ "R1", "a loop of the whole table", loop_of_all, BROKEN },
	{ "R2", "a next just beyond the table", next_beyond, BROKEN },
	{ "R2", "a next far beyond the table", next_far_beyond, BROKEN },
	{ "R2", "a next beyond the indirect table", next_beyond_a_table, BROKEN },
	{ "R3", "a read into the device's registers", read_to_registers, IOERR },
	{ "R3", "a write from the device's registers", write_from_registers, IOERR },
	{ "R3", "a read into the local APIC", read_to_the_apic, IOERR },
	{ "R3", "a read into the hole below 4 GiB", read_to_the_hole, IOERR },
	{ "R3", "a read above all memory", read_above_4g, IOERR },
	{ "R3", "a read across the end of memory", read_across_the_end, IOERR },
	{ "R3", "a write across the end of memory", write_across_the_end, IOERR },
	{ "R3", "a read that wraps", read_that_wraps, IOERR },
	{ "R3", "a write that wraps", write_that_wraps, IOERR },
	{ "R3", "a read to 2^63", read_to_half_the_world, IOERR },
	{ "R3", "a read half outside", half_outside, IOERR },
	{ "R3", "a header outside memory", header_outside, IOERR },
	{ "R3", "a header across the end of memory", header_across_the_end, IOERR },
	{ "R3", "a header that wraps", header_that_wraps, IOERR },
	{ "R3", "a status outside memory", status_outside, BROKEN },
	{ "R4", "descriptors of no bytes in between", nothing_in_between, OK },
	{ "R4", "descriptors of no bytes alone", only_nothing, BROKEN },
	{ "R4", "one descriptor of no bytes", one_nothing, BROKEN },
	{ "R5", "a write of over 4 GiB", over_4g, IOERR },
	{ "R5", "a read of over 4 GiB", read_over_4g, IOERR },
	{ "R5", "a segment of 4 GiB", one_of_4g, IOERR },
	{ "R5", "segments whose lengths add up to 512 modulo 2^32", sum_of_2_32, IOERR },
	{ "R5", "a read as long as memory", as_long_as_memory, IOERR },
	{ "R6", "an indirect table in an indirect table", nested, BROKEN },
	{ "R6", "an indirect descriptor with a next", with_a_next, BROKEN },
	{ "R6", "an indirect table of 24 bytes", of_24_bytes, BROKEN },
	{ "R6", "an indirect table of no bytes", of_nothing, BROKEN },
	{ "R6", "an indirect table longer than the queue with a short chain", longer_than_the_queue, OK },
	{ "R6", "a chain in an indirect table that is longer than the queue", chain_longer_than_the_queue, BROKEN },
	{ "R6", "an indirect table of 4 GiB", of_4g, BROKEN },
	{ "R6", "an indirect table across the end of memory", table_outside, BROKEN },
	{ "R6", "an indirect table that wraps", table_that_wraps, BROKEN },
	{ "R6", "an indirect table in the device's registers", table_in_registers, BROKEN },
	{ "R6", "an indirect table behind another descriptor", after_the_header, OK | BROKEN },
	{ "R6", "an indirect table that was not negotiated", not_negotiated, BROKEN },
	{ "R9", "writable before readable", writable_first, IOERR | BROKEN },
	{ "R9", "writable before the header", writable_before_the_header, IOERR },
	{ "R9", "a status that is readable only", readable_status, BROKEN },
	{ "R9", "no status", no_status, BROKEN },
	{ "R9", "a read into readable memory", read_into_readable, IOERR },
	{ "R9", "a write from writable memory", write_from_writable, IOERR },
	{ "R9", "a flush with data", flush_with_data, OK | IOERR },
	{ "R9", "a status inside the data", status_in_the_data, OK },
	{ "R9", "a status over the header", status_in_the_header, OK },
	{ "R12", "data over the used ring", onto_the_used_ring, SELF },
	{ "R12", "data over the available ring", onto_the_available_ring, SELF },
	{ "R12", "data over the descriptors", onto_the_descriptors, OK },
	{ "R12", "data over the header", onto_the_header, OK },
	{ "R12", "the used ring as data of a write", writes_its_used_ring, OK },
	{ "R12", "data over the guest's code", onto_the_guest_itself, OK },
};
const struct attacks chains = { all, sizeof all / sizeof *all };
