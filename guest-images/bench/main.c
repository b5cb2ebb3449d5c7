/*
 * The benchmark guest: one load on one disk, and what came of it.
 *
 * Command line: rw=randread|randwrite|seqread|seqwrite|mixed|writeflush bs=BYTES depth=N ms=N warm_ms=N
 * tsc_khz=N seed=N ring=0|3 transport=mmio|pci, and for mmio mmio=BASE [mmio_count=N mmio_step=BYTES].
 * Writes go to the whole disk. Before the load it writes a pattern and reads it back. Output: one line
 * `result NAME=NUMBER ...`, times in nanoseconds; exit code 0x10 if all is well, 1 if not.
 */
#include "guest.h"

const char guest_name[] = "bench guest";

#define DEPTH_MAX 128
#define BYTES_MAX (128u << 10)
/* Buffers lie above everything else, on pages of 2 MiB. */
#define BUFFERS ((u8 *)(32u << 20))

/* 64 buckets for each doubling: a percentile is right to 1.6 %. */
#define BUCKETS (64 * 40)
static u32 histogram[BUCKETS];
static u64 random_state, next_block, blocks;
static u32 bytes, depth;
static u64 begun[DEPTH_MAX];
static bool flush_next[DEPTH_MAX], is_flush[DEPTH_MAX];

enum pattern { RANDREAD, RANDWRITE, SEQREAD, SEQWRITE, MIXED, WRITEFLUSH };
static const char *const names[] = { "randread", "randwrite", "seqread", "seqwrite", "mixed", "writeflush" };
static enum pattern pattern;

static u64 random_number(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static u32 bucket(u64 cycles)
{
	if (cycles < 64)
		return (u32)cycles;
	u32 high = 63 - (u32)__builtin_clzll(cycles), shift = high - 6;
	u32 index = (shift + 1) * 64 + (u32)((cycles >> shift) & 63);
	return index < BUCKETS ? index : BUCKETS - 1;
}

static u64 cycles_of(u32 index)
{
	u32 shift = index / 64;
	return shift ? (64ull + index % 64) << (shift - 1) : index;
}

static void *buffer(u32 slot) { return BUFFERS + (u64)slot * bytes; }

static void start(u32 slot)
{
	begun[slot] = rdtsc();
	is_flush[slot] = pattern == WRITEFLUSH && flush_next[slot];
	flush_next[slot] = !is_flush[slot];
	if (is_flush[slot])
		return submit(slot, FLUSH, 0, NULL, 0);
	bool sequential = pattern == SEQREAD || pattern == SEQWRITE;
	u64 block = sequential ? next_block++ % blocks : random_number() % blocks;
	bool reads = pattern == RANDREAD || pattern == SEQREAD || (pattern == MIXED && random_number() % 10 < 7);
	submit(slot, reads ? IN : OUT, block * (bytes / 512), buffer(slot), bytes);
}

static u32 wait_one(void)
{
	int slot;
	while ((slot = reap()) < 0)
		pause();
	if (status_of((u32)slot) != 0)
		fail("a request's status is not OK");
	return (u32)slot;
}

/* What is written is what is read, in the first and the last blocks. */
static void verify(void)
{
	u64 *words = buffer(0);
	for (u32 round = 0; round < 16; round++) {
		u64 block = round < 8 ? round : blocks - 1 - round;
		for (u32 i = 0; i < bytes / 8; i++)
			words[i] = block * 0x9e3779b97f4a7c15 + i;
		submit(0, OUT, block * (bytes / 512), words, bytes);
		kick();
		wait_one();
	}
	for (u32 round = 0; round < 16; round++) {
		u64 block = round < 8 ? round : blocks - 1 - round;
		for (u32 i = 0; i < bytes / 8; i++)
			words[i] = 0;
		submit(0, IN, block * (bytes / 512), words, bytes);
		kick();
		wait_one();
		for (u32 i = 0; i < bytes / 8; i++)
			if (words[i] != block * 0x9e3779b97f4a7c15 + i)
				fail("what was read is not what was written");
	}
}

/* Keeps the queue full until UNTIL; how many requests ended, FLUSHes not among them. */
static u64 load(u64 until, bool measured)
{
	u64 ended = 0;
	for (;;) {
		int slot = reap();
		if (slot < 0) {
			pause();
			continue;
		}
		u64 now = rdtsc();
		do {
			if (status_of((u32)slot) != 0)
				fail("a request's status is not OK");
			if (measured && !is_flush[slot])
				histogram[bucket(now - begun[slot])]++;
			ended += !is_flush[slot];
			start((u32)slot);
		} while ((slot = reap()) >= 0);
		kick();
		if (now >= until)
			return ended;
	}
}

static u64 percentile(u64 total, u32 per_thousand)
{
	u64 wanted = total * per_thousand / 1000, seen = 0;
	for (u32 i = 0; i < BUCKETS; i++) {
		seen += histogram[i];
		if (seen > wanted)
			return cycles_of(i);
	}
	return 0;
}

void run(const char *text)
{
	command_line_text = text;
	bytes = (u32)option_number("bs", 4096);
	depth = (u32)option_number("depth", 1);
	u64 khz = option_number("tsc_khz", 0);
	random_state = option_number("seed", 1) * 0x9e3779b97f4a7c15 | 1;
	u32 known = sizeof names / sizeof *names, at = 0;
	while (at < known && !option_is("rw", names[at]))
		at++;
	if (at == known || !khz || !depth || depth > DEPTH_MAX || !bytes || bytes % 512 || bytes > BYTES_MAX)
		fail("rw, bs, depth or tsc_khz cannot be");
	pattern = (enum pattern)at;
	bring_up();
	blocks = capacity_sectors() / (bytes / 512);
	if (blocks < 32)
		fail("the disk is too small");
	verify();

	for (u32 slot = 0; slot < depth; slot++)
		start(slot);
	kick();
	load(rdtsc() + option_number("warm_ms", 100) * khz, false);
	u64 rung = doorbells, from = rdtsc();
	u64 ended = load(from + option_number("ms", 1000) * khz, true);
	u64 cycles = rdtsc() - from;
	rung = doorbells - rung;
	/* Everything in flight ends before the machine does. */
	for (u32 slot = 0; slot < depth; slot++)
		wait_one();
	print("result");
	print_number("ops", ended);
	print_number("ns", cycles * 1000 / khz * 1000);
	print_number("p50", percentile(ended, 500) * 1000000 / khz);
	print_number("p99", percentile(ended, 990) * 1000000 / khz);
	print_number("p999", percentile(ended, 999) * 1000000 / khz);
	print_number("doorbells", rung);
	print_number("verified", 1);
	print(" transport=");
	print(transport_name());
	print("\r\n");
	end(0x10);
}
