/* R7, R8, R13, R15, R17, R18, R23: rings that jump, what changes while it is read, resets and storms. */
#include "attacks.h"

#define H { AT(&header), 16, 0 }
#define S { AT(&status[0]), 1, D_WRITE }
#define SCRATCH 64

static u64 random_number(void)
{
	static u64 state = 0x9e3779b97f4a7c15;
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void wait_ms(u64 ms)
{
	for (u64 since = rdtsc(); !is_over(since, ms);)
		pause();
}

/* R7 */
static void good_read(void) { put_header(IN, 3), CHAIN(table, H, { AT(DATA), 512, D_WRITE }, S); }
static void must_break(const char *why)
{
	u64 since = rdtsc();
	while (!is_broken())
		if (is_over(since, 10000))
			fail(why);
}
static void index_jumps(void)
{
	good_read();
	available.idx = (u16)(size + 1);
	kick();
	must_break("R7: avail.idx may jump");
}
static void index_jumps_back(void)
{
	good_read();
	available.idx = 0xffff;
	kick();
	must_break("R7: avail.idx may go back");
}
static void index_jumps_half_way(void)
{
	good_read();
	available.idx = 0x8000;
	kick();
	must_break("R7: avail.idx may jump by 2^15");
}
static void head_beyond(void)
{
	offer(size);
	kick();
	must_break("R7: a head beyond the table");
}
static void head_far_beyond(void)
{
	offer(0xffff);
	kick();
	must_break("R7: a head far beyond the table");
}

/* R8: the device must finish each, and keep none by the head's name. */
static void one_head_often(void)
{
	struct used_entry entry;
	good_read();
	for (u32 round = 0; round < 50; round++) {
		offer_many(size);
		kick();
		for (u32 i = 0; i < size; i++)
			if (!wait_used(&entry) || entry.id != 0)
				fail("R8: a head that is in flight often is not finished as often");
	}
}
static void one_head_often_bounced(void)
{
	struct used_entry entry;
	/* On an odd address: a private buffer each, with O_DIRECT. */
	put_header(IN, 3);
	CHAIN(table, H, { AT(DATA + 1), 64 << 10, D_WRITE }, S);
	for (u32 round = 0; round < 20; round++) {
		offer_many(size);
		kick();
		for (u32 i = 0; i < size; i++)
			if (!wait_used(&entry) || entry.id != 0)
				fail("R8: a bounced head that is in flight often is not finished as often");
	}
}
static void one_head_of_changing_kind(void)
{
	struct used_entry entry;
	good_read();
	for (u32 round = 0; round < 200; round++) {
		offer_many(4);
		kick();
		for (u32 i = 0; i < 4; i++) {
			header.kind = i & 1 ? GET_ID : i & 2 ? FLUSH : IN;
			if (!wait_used(&entry))
				return;
		}
	}
}

/* R13: everything that a request consists of changes between offer and answer. */
static void flip(u32 what)
{
	switch (what % 10) {
	case 0: header.kind = (u32)random_number() % 32 == OUT ? IN : (u32)random_number() & 0xe; break;
	case 1: header.sector = random_number(); break;
	case 2: table[1].address = random_number(); break;
	case 3: table[1].length = (u32)random_number(); break;
	case 4: table[1].flags = (u16)(random_number() & (D_NEXT | D_WRITE)); break;
	case 5: table[1].next = (u16)random_number(); break;
	case 6: table[0].length = (u32)random_number() & 31; break;
	case 7: table[2].address = random_number() & 1 ? AT(&status[1]) : random_number(); break;
	case 8: table[0].flags = (u16)(random_number() & 7); break;
	case 9: available.idx = (u16)(available.idx + (random_number() & 1)); break;
	}
}
static void what_changes_meanwhile(void)
{
	struct used_entry entry;
	u32 broken = 0, answered = 0;
	for (u32 round = 0; round < 1500; round++) {
		/* A read into memory: whatever is made of it, nothing is written to the image. */
		good_read();
		writable_max = ~0ull;
		offer(0);
		kick();
		for (u32 i = 0; i < 1 + round % 7; i++)
			flip((u32)random_number());
		if (wait_used(&entry)) {
			answered++;
		} else {
			broken++;
		}
		if (is_broken() || round % 50 == 49)
			start();
	}
	if (!answered)
		fail("R13: nothing was answered");
}

/* R15: what a reset has returned from writes to the guest's memory no more. */
#define FLIGHT_BYTES (64u << 10)
static u64 sum_of(const u8 *data, u32 bytes)
{
	u64 sum = 0;
	for (u32 at = 0; at < bytes; at += 8)
		sum = sum * 31 + *(const u64 *)(data + at);
	return sum;
}
static void put_in_flight(u32 kind)
{
	for (u16 at = 0; at < 5; at++) {
		static struct header headers[5];
		headers[at] = (struct header){ kind, 0, SCRATCH + at * (FLIGHT_BYTES / 512) };
		struct piece pieces[] = {
			{ AT(&headers[at]), 16, 0 },
			{ AT(DATA + at * FLIGHT_BYTES), FLIGHT_BYTES, kind == IN ? D_WRITE : 0 },
			{ AT(&status[at]), 1, D_WRITE },
		};
		put_pieces(table, (u16)(3 * at), pieces, 3);
		offer((u16)(3 * at));
	}
	kick();
}
static void resets_in_flight(u32 kind)
{
	for (u32 round = 0; round < 60; round++) {
		start();
		for (u32 at = 0; at < 5 * FLIGHT_BYTES; at += 4096)
			DATA[at] = (u8)round;
		put_in_flight(kind);
		for (u32 i = 0; i < (round % 8) * 200; i++)
			pause();
		reset();
		u64 before = sum_of(DATA, 5 * FLIGHT_BYTES);
		u16 index = used.idx;
		wait_ms(1);
		if (sum_of(DATA, 5 * FLIGHT_BYTES) != before || used.idx != index)
			fail("R15: memory changes after a reset");
	}
}
static void resets_with_reads(void) { resets_in_flight(IN); }
static void resets_with_writes(void) { resets_in_flight(OUT); }
static void driver_ok_again(void)
{
	put_in_flight(IN);
	for (u32 i = 0; i < 200; i++) {
		set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
		set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
	}
}
static void features_again(void)
{
	put_in_flight(IN);
	for (u32 i = 0; i < 64; i++) {
		take_features(1ull << i | F_VERSION_1);
		set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
		set_status((u8)(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | i));
	}
	u64 now = offered();
	if (now != offered_features)
		fail("R15: the device's offer changes");
}
static void features_that_are_not_offered(void)
{
	for (u32 bit = 0; bit < 64; bit++) {
		u64 feature = 1ull << bit;
		if (offered_features & feature)
			continue;
		reset();
		set_status(ACKNOWLEDGE | DRIVER);
		take_features(F_VERSION_1 | feature);
		set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
		if (get_status() & FEATURES_OK)
			fail("R15: a feature that was not offered is accepted");
	}
}
static void every_status(void)
{
	for (u32 value = 255; value; value--) {
		set_status((u8)value);
		if (value % 16 == 0)
			start(), good_read(), offer(0), kick();
	}
}
static void resets_without_end(void)
{
	for (u32 i = 0; i < 2000; i++)
		set_status(0);
	for (u32 i = 0; i < 200; i++)
		start();
}

/* R17 */
static void doorbells(void)
{
	for (u32 i = 0; i < 20000; i++)
		kick();
}
static void doorbells_while_it_works(void)
{
	struct used_entry entry;
	good_read();
	for (u32 round = 0; round < 200; round++) {
		offer_many(size);
		for (u32 i = 0; i < 50; i++)
			kick();
		for (u32 i = 0; i < size; i++)
			if (!wait_used(&entry))
				fail("R17: doorbells break the ring");
	}
}

/* R18: the test counts the lines of the log. */
static void errors_without_end(void)
{
	struct used_entry entry;
	put_header(IN, capacity);
	CHAIN(table, { AT(&header), 15, 0 }, S);
	for (u32 round = 0; round < 1000; round++) {
		offer_many(size);
		kick();
		for (u32 i = 0; i < size; i++)
			if (!wait_used(&entry) || status[0] != S_IOERR)
				fail("R18: a bad request does not fail");
	}
}
static void broken_without_end(void)
{
	for (u32 round = 0; round < 200; round++) {
		start();
		head_beyond();
	}
}

/* R23: as much at once as the largest queue takes; the test looks at the memory. */
static void all_at_once(u32 kind)
{
	struct used_entry entry;
	start_with(LARGE, offered_features & ~F_EVENT_IDX);
	if (!(offered_features & F_INDIRECT))
		return;
	put_header(kind, SCRATCH);
	for (u16 at = 0; at < size; at++) {
		put_pieces(indirect, (u16)(4 * at),
			   (struct piece[]){ H, { AT(DATA + 1), 512 << 10, kind == IN ? D_WRITE : 0 }, S }, 3);
		/* Next within the table of its own. */
		indirect[4 * at].next = 1;
		indirect[4 * at + 1].next = 2;
		put(table, at, AT(&indirect[4 * at]), 48, D_INDIRECT, 0);
	}
	for (u16 at = 0; at < size; at++)
		offer(at);
	kick();
	for (u32 i = 0; i < size; i++)
		if (!wait_used(&entry))
			fail("R23: a full queue breaks the ring");
	if (status[0] != S_OK)
		fail("R23: a full queue fails");
}
static void full_of_reads(void) { all_at_once(IN); }
static void full_of_writes(void) { all_at_once(OUT); }

static const struct attack all[] = {
	{ "R7", "avail.idx jumps by more than the queue", index_jumps, SELF },
	{ "R7", "avail.idx goes back", index_jumps_back, SELF },
	{ "R7", "avail.idx jumps by 2^15", index_jumps_half_way, SELF },
	{ "R7", "a head just beyond the table", head_beyond, SELF },
	{ "R7", "a head far beyond the table", head_far_beyond, SELF },
	{ "R8", "one head in flight 16 times", one_head_often, SELF },
	{ "R8", "one head in flight 16 times, bounced", one_head_often_bounced, SELF },
	{ "R8", "one head in flight, of changing type", one_head_of_changing_kind, SELF },
	{ "R13", "requests that change while they are read", what_changes_meanwhile, SELF },
	{ "R15", "resets with reads in flight", resets_with_reads, SELF },
	{ "R15", "resets with writes in flight", resets_with_writes, SELF },
	{ "R15", "DRIVER_OK again and again with I/O in flight", driver_ok_again, SELF },
	{ "R15", "features negotiated anew with I/O in flight", features_again, SELF },
	{ "R15", "features that were not offered", features_that_are_not_offered, SELF },
	{ "R15", "every value of the status", every_status, SELF },
	{ "R15", "resets without end", resets_without_end, SELF },
	{ "R17", "20000 doorbells for nothing", doorbells, SELF },
	{ "R17", "doorbells without end while it works", doorbells_while_it_works, SELF },
	{ "R18", "16000 bad requests", errors_without_end, SELF },
	{ "R18", "200 broken rings", broken_without_end, SELF },
	{ "R23", "a queue full of large reads on odd addresses", full_of_reads, SELF },
	{ "R23", "a queue full of large writes on odd addresses", full_of_writes, SELF },
};
const struct attacks rings = { all, sizeof all / sizeof *all };
