/*
 * The hostile guest: attacks one disk, on every rule from R1 to R23 (docs/requirements.md). A good request follows
 * each attack.
 *
 * Command line: transport=mmio|pci [mmio=BASE] ring=0|3 tsc_khz=N ram=END [only=RULE] [again=1]. One line an attack on
 * COM1. Sectors 0, 3 and 64 to 1151 of the disk are its own; a test sees that the others are as before. With again=1
 * it only looks whether sector 0 is still what it wrote. After all it waits for a byte from COM1, so that
 * the VMM can be looked at. With serve=1 it attacks nothing and does what it is told (serve.c). Exit code
 * 0x10 if all is well, 1 if not.
 */
#include "attacks.h"

#define GOOD_SECTOR 3

const char guest_name[] = "hostile guest";

static u8 *const good = DATA + DATA_BYTES - 4096;

static void good_request(void)
{
	for (u32 at = 0; at < 512; at++)
		good[at] = 0;
	if (transfer(IN, GOOD_SECTOR, good, 512) != OK)
		fail("a good request does not work any more");
	for (u32 at = 0; at < 512; at++)
		if (good[at] != pattern[at])
			fail("what a good request reads is not what was written");
}

static void run_one(const struct attack *attack)
{
	print(attack->rule);
	print(" ");
	print(attack->name);
	print(": ");
	start();
	status[0] = UNTOUCHED;
	attack->prepare();
	const char *how = "over";
	if (attack->expected != SELF) {
		offer(0);
		kick();
		enum outcome found = outcome();
		how = outcome_name(found);
		if (!(attack->expected & found)) {
			print(how);
			print("\r\n");
			fail("that is not how it should end");
		}
		if (found != BROKEN)
			good_request();
	}
	/* Whatever it was, a reset makes the device whole. */
	start();
	good_request();
	print(how);
	print("; alive\r\n");
}

static u32 run_all(const struct attacks *attacks)
{
	u32 count = 0;
	for (u32 at = 0; at < attacks->count; at++) {
		const struct attack *attack = &attacks->all[at];
		if (option("only") && !option_is("only", attack->rule))
			continue;
		run_one(attack);
		count++;
	}
	return count;
}

static void look_again(void)
{
	if (transfer(IN, 0, DATA, 512) != OK || DATA[0] != 'Q' || DATA[1] != 'F' || DATA[104] != '/')
		fail("R21: sector 0 is not what was written");
	print("R21 raw as before\r\n");
}

void run(const char *text)
{
	command_line_text = text;
	ram_end = option_number("ram", 128u << 20);
	if (option("serve"))
		serve();
	attach(0, BLOCK_DEVICE, 0, 0);
	start();
	print_hex("features", offered_features);
	print_number("sectors", capacity);
	print("\r\n");
	if (option_is("again", "1")) {
		look_again();
		end(0x10);
	}
	for (u32 at = 0; at < 512; at++)
		good[at] = pattern[at] = (u8)(at * 7 + 1);
	if (transfer(OUT, GOOD_SECTOR, good, 512) != OK || transfer(FLUSH, 0, NULL, 0) != OK)
		fail("the good sector cannot be written");
	u32 count = run_all(&chains) + run_all(&requests) + run_all(&rings) + run_all(&registers);
	u32 of_console = option("only") ? 0 : attack_console();
	start();
	good_request();
	print("result");
	print_number("attacks", count);
	print_number("console", of_console);
	print("\r\n");
	read_console();
	end(0x10);
}
