/*
 * A guest that does what it is told on COM1, a letter at a time, while the host's disk is in trouble:
 * w and r write and read all of the first disk by 64 KiB and tell how many blocks went well and how many did
 * not, f flushes it, h begins a write to it and does not wait, R resets it, b reads from the second disk, q
 * ends. All else comes back.
 */
#include "attacks.h"

#define BLOCK (64u << 10)

u8 read_console(void)
{
	while (!(inb(0x3fd) & 1))
		pause();
	return inb(0x3f8);
}

static void all_of_it(u32 kind, const char *name)
{
	u32 good = 0, bad = 0;
	for (u64 sector = 0; sector + BLOCK / 512 <= capacity; sector += BLOCK / 512) {
		enum outcome found = transfer(kind, sector, DATA, BLOCK);
		if (found == OK)
			good++;
		else if (found == IOERR)
			bad++;
		else
			fail("the device gives neither OK nor IOERR");
	}
	print(name);
	print_number("ok", good);
	print_number("ioerr", bad);
	print("\r\n");
}

static void tell(const char *name, enum outcome found)
{
	print(name);
	print(" ");
	print(outcome_name(found));
	print("\r\n");
}

static void begin_a_write(void)
{
	put_header(OUT, 0);
	status[0] = UNTOUCHED;
	CHAIN(table, { AT(&header), 16, 0 }, { AT(DATA), 4096, 0 }, { AT(&status[0]), 1, D_WRITE });
	offer(0);
	kick();
	print("begun\r\n");
}

static void read_from_the_other(void)
{
	/* The header and the status of what may be in flight on the first disk are left alone. */
	static struct header own;
	change_hands(1);
	own = (struct header){ IN, 0, 3 };
	status[1] = UNTOUCHED;
	CHAIN(table, { AT(&own), 16, 0 }, { AT(DATA + (1 << 20)), 4096, D_WRITE }, { AT(&status[1]), 1, D_WRITE });
	offer(0);
	kick();
	struct used_entry entry;
	bool answered = wait_used(&entry);
	print(answered && status[1] == S_OK ? "other OK\r\n" : "other failed\r\n");
	change_hands(0);
}

_Noreturn void serve(void)
{
	attach(0, BLOCK_DEVICE, 0, 0);
	start();
	if (option_is("serve", "2")) {
		attach(1, BLOCK_DEVICE, 1, 0);
		start();
		change_hands(0);
	}
	print("ready\r\n");
	for (;;) {
		u8 letter = read_console();
		switch (letter) {
		case 'w': all_of_it(OUT, "written"); break;
		case 'r': all_of_it(IN, "read"); break;
		case 'f': tell("flushed", transfer(FLUSH, 0, NULL, 0)); break;
		case 'h': begin_a_write(); break;
		case 'R':
			print("resets\r\n");
			reset();
			print("reset\r\n");
			break;
		case 'b': read_from_the_other(); break;
		case 'q': end(0x10);
		default: outb(0x3f8, letter);
		}
	}
}
