/* R14, R16: registers written at the wrong time, in the wrong width, at the wrong place; ports; holes. */
#include "attacks.h"

#define H { AT(&header), 16, 0 }
#define S { AT(&status[0]), 1, D_WRITE }

/* R14 */
static void set_up_when_live(void)
{
	static const u16 sizes[] = { 0, 1, 3, 15, 256, 0x8000, 0xffff };
	for (u32 at = 0; at < sizeof sizes / sizeof *sizes; at++)
		set_queue_size(sizes[at]);
	for (enum part part = TABLE; part <= USED; part++) {
		set_queue_address(part, ~0ull);
		set_queue_address(part, ram_end - 2);
		set_queue_address(part, 1);
	}
	/* All of it is ignored: the queue works as before. */
	if (transfer(IN, 3, DATA, 512) != OK)
		fail("R14: a live queue's set-up changes");
}
static void enabled_twice(void)
{
	set_queue_ready(1);
	set_queue_ready(0xffff);
	if (transfer(IN, 3, DATA, 512) != OK)
		fail("R14: enabled twice, the queue stops");
}
static void disabled_with_io(void)
{
	put_header(IN, 3);
	CHAIN(table, H, { AT(DATA), 64 << 10, D_WRITE }, S);
	offer_many(size);
	kick();
	set_queue_ready(0);
	set_queue_size(4);
	set_queue_address(USED, AT(DATA));
	set_queue_ready(1);
}
static void queues_that_there_are_not(void)
{
	for (u32 queue = 1; queue < 0x10000; queue = queue * 2 + 1) {
		select_queue((u16)queue);
		if (queue > 64 && queue_max())
			fail("R14: there is a queue that cannot be");
		set_queue_size(16);
		set_queue_address(TABLE, AT(table));
		set_queue_address(AVAILABLE, AT(&available));
		set_queue_address(USED, AT(&used));
		set_queue_ready(1);
	}
	select_queue(0);
}
static void doorbells_of_no_queue(void)
{
	for (u32 queue = 1; queue < 0x10000; queue = queue * 2 + 1) {
		if (place.is_pci && queue > 0x3ff)
			break;
		notify((u16)queue);
	}
	if (!place.is_pci)
		for (u32 bit = 0; bit < 32; bit++)
			write32(place.mmio + 0x50, 1u << bit);
}
static void sizes_that_cannot_be(void)
{
	static const u16 sizes[] = { 0, 3, 15, 17, 0x8000, 0xffff };
	for (u32 at = 0; at < sizeof sizes / sizeof *sizes; at++) {
		begin(offered_features & ~F_EVENT_IDX);
		set_queue_size(sizes[at]);
		set_queue_address(TABLE, AT(table));
		set_queue_address(AVAILABLE, AT(&available));
		set_queue_address(USED, AT(&used));
		set_queue_ready(1);
		set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
		size = SMALL;
		put_header(IN, 3);
		CHAIN(table, H, { AT(DATA), 512, D_WRITE }, S);
		offer(0);
		kick();
	}
}
static void rings_that_cannot_be(void)
{
	const u64 places[] = { 1,	      ram_end - 16, ram_end,	   3ull << 30,	  0xfee00000, AT(place.device),
			       ~0ull & ~15ull, 1ull << 63,   ~0ull - 0xfff, 0x9f001ull };
	for (enum part part = TABLE; part <= USED; part++)
		for (u32 at = 0; at < sizeof places / sizeof *places; at++) {
			begin(offered_features & ~F_EVENT_IDX);
			set_queue_size(SMALL);
			set_queue_address(TABLE, part == TABLE ? places[at] : AT(table));
			set_queue_address(AVAILABLE, part == AVAILABLE ? places[at] : AT(&available));
			set_queue_address(USED, part == USED ? places[at] : AT(&used));
			set_queue_ready(1);
			set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
			kick();
		}
}
static void rings_over_each_other(void)
{
	begin(offered_features & ~F_EVENT_IDX);
	size = SMALL;
	set_queue_size(size);
	set_queue_address(TABLE, AT(table));
	set_queue_address(AVAILABLE, AT(table));
	set_queue_address(USED, AT(table));
	set_queue_ready(1);
	set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
	for (u32 i = 0; i < 100; i++) {
		table[0].address += 0x10000;
		kick();
	}
}

/* R16 */
static u64 read_of(volatile u8 *at, u32 width)
{
	return width == 1 ? read8(at) : width == 2 ? read16(at) : width == 4 ? read32(at) : read64(at);
}
static void write_of(volatile u8 *at, u32 width, u64 value)
{
	if (width == 1)
		write8(at, (u8)value);
	else if (width == 2)
		write16(at, (u16)value);
	else if (width == 4)
		write32(at, (u32)value);
	else
		write64(at, value);
}
static u64 sink;
static void read_all(volatile u8 *from, u32 bytes, u32 step)
{
	for (u32 width = 1; width <= 8; width *= 2)
		for (u32 at = 0; at + width <= bytes; at += step)
			sink += read_of(from + at, width);
}
static void write_all(volatile u8 *to, u32 bytes, u32 step, u64 value)
{
	for (u32 width = 1; width <= 8; width *= 2)
		for (u32 at = 0; at + width <= bytes; at += step)
			write_of(to + at, width, value);
}
static void registers_read(void)
{
	if (place.is_pci) {
		read_all(place.common, 0x40, 1);
		read_all(place.isr, 16, 1);
		read_all(place.notify, 16, 1);
		read_all(place.common + 0x4000, 0x100, 3);
		read_all(place.common, 0x8000, 61);
	} else {
		read_all(place.mmio, 0x100, 1);
	}
	/* Across the edge, onto the next device or nothing. */
	volatile u8 *edge = place.is_pci ? place.common + 0x8000 : place.mmio + 0x1000;
	for (u32 width = 2; width <= 8; width *= 2)
		sink += read_of(edge - width / 2, width);
}
static void configuration_read(void)
{
	read_all(place.device, 0x100, 1);
	read_all(place.device + 0x100, 0x100, 1);
}
static void configuration_written(void)
{
	write_all(place.device, 0x80, 1, ~0ull);
	write_all(place.device, 0x80, 1, 0);
	u64 now = (u64)read32(place.device + 4) << 32 | read32(place.device);
	if (now != capacity)
		fail("R16: the capacity can be written");
}
static void registers_written(u64 value)
{
	if (place.is_pci) {
		write_all(place.common, 0x40, 1, value);
		write_all(place.isr, 16, 1, value);
		write_all(place.notify, 64, 1, value);
		write_all(place.common + 0x4000, 0x40, 1, value);
		write_all(place.common + 0x6000, 0x10, 1, value);
	} else {
		write_all(place.mmio, 0x100, 1, value);
	}
}
static void registers_of_ones(void) { registers_written(~0ull); }
static void registers_of_zeroes(void) { registers_written(0); }
static void registers_of_a_pattern(void) { registers_written(0xa5c3960f12345678); }

/* All of a function's configuration, by ports of every width. */
static void pci_configuration(void)
{
	if (!place.is_pci)
		return;
	u32 command = config_read(place.number, 4), low = config_read(place.number, 0x10);
	u32 high = config_read(place.number, 0x14);
	for (u32 at = 0; at < 0x100; at += 4) {
		outl(0xcf8, 1u << 31 | place.number << 11 | at);
		for (u16 byte = 0; byte < 4; byte++) {
			sink += inb((u16)(0xcfc + byte)) + inw((u16)(0xcfc + byte));
			outb((u16)(0xcfc + byte), (u8)at);
			outw((u16)(0xcfc + byte), 0xffff);
		}
		outl(0xcfc, 0);
		outl(0xcfc, ~0u);
		sink += inl(0xcfc);
	}
	/* The window into the registers (virtio 4.1.4.9) with every region, offset and length. */
	for (u32 at = config_read(place.number, 0x34) & 0xfc; at; at = config_read(place.number, at) >> 8 & 0xfc) {
		u32 head = config_read(place.number, at);
		if ((head & 0xff) != 9 || head >> 24 != 5)
			continue;
		for (u32 region = 0; region < 8; region++)
			for (u32 length = 0; length < 9; length++)
				for (u32 round = 0; round < 8; round++) {
					static const u32 offsets[] = { 0, 0x14, 0x1fff, 0x2000, 0x7ffe, 0x8000, 0x7fffffff, ~0u };
					config_write(place.number, at + 4, region);
					config_write(place.number, at + 8, offsets[round]);
					config_write(place.number, at + 12, length);
					sink += config_read(place.number, at + 16);
					config_write(place.number, at + 16, ~0u);
				}
	}
	config_write(place.number, 0x10, low);
	config_write(place.number, 0x14, high);
	config_write(place.number, 4, command | 6);
	if (config_read(place.number, 0x10) != low)
		fail("R16: the region does not come back");
}
/* Onto memory, onto another function, to nowhere, with the doorbells. */
static void pci_region_moved(void)
{
	if (!place.is_pci)
		return;
	u32 command = config_read(place.number, 4), low = config_read(place.number, 0x10);
	static const u32 to[] = { 0x100000, 0x2000000, 0xd1000000, 0xd1008000, 0xe0000000, 0xfec00000, 0xfee00000, 0xfffffff0 };
	for (u32 at = 0; at < sizeof to / sizeof *to; at++) {
		config_write(place.number, 0x10, to[at]);
		sink += read32(place.common);
		notify(0);
		config_write(place.number, 4, command & ~2u);
		sink += read32(place.common);
		config_write(place.number, 4, command | 6);
	}
	config_write(place.number, 0x10, low);
	config_write(place.number, 4, command | 6);
}
/* The bus's memory, and what each function has of it. */
enum { WINDOW = 0xd1000000, FUNCTION_BYTES = 0x8000, FUNCTIONS = 32 };

static u32 region_of(u32 number) { return config_read(number, 0x10) & ~15u; }

/* Moves the function, and goes on there. */
static void move_to(u32 to)
{
	u64 by = (u64)to - region_of(place.number);
	config_write(place.number, 0x10, to);
	place.common += by;
	place.notify += by;
	place.device += by;
	if (place.isr)
		place.isr += by;
}
static void works(const char *if_not)
{
	if (transfer(IN, 3, DATA, 512) != OK)
		fail(if_not);
}
/* About the window, with a request in flight each time; sizes asked for in between; on and off. */
static void pci_function_moved_at_work(void)
{
	if (!place.is_pci)
		return;
	u32 home = region_of(place.number), command = config_read(place.number, 4);
	static const u32 free[] = { 0, FUNCTIONS - 1, FUNCTIONS - 2 };
	for (u32 round = 0; round < 48; round++) {
		u32 to = WINDOW + free[round % 3] * FUNCTION_BYTES;
		put_header(IN, 3);
		status[0] = UNTOUCHED;
		CHAIN(table, H, { AT(DATA), 64 << 10, D_WRITE }, S);
		offer(0);
		kick();
		move_to(to);
		if (outcome() != OK)
			fail("R16: a request is lost when its function moves");
		works("R16: a function that has moved does not work");
		config_write(place.number, 0x10, ~0u);
		works("R16: a function whose size is asked for does not work");
		config_write(place.number, 0x14, ~0u);
		config_write(place.number, 0x14, 0);
		config_write(place.number, 0x10, to);
		config_write(place.number, 4, command & ~2u);
		if (read32(place.common) != ~0u)
			fail("R16: memory that is switched off answers");
		kick();
		config_write(place.number, 4, command | 6);
		works("R16: memory that was switched off does not come back");
	}
	move_to(home);
	works("R16: a function that has come home does not work");
}
/* Onto the next function's registers, and that one onto ours. */
static void pci_functions_over_each_other(void)
{
	if (!place.is_pci || (config_read(place.number + 1, 0) & 0xffff) != 0x1af4)
		return;
	u32 home = region_of(place.number), other = region_of(place.number + 1);
	for (u32 round = 0; round < 16; round++) {
		move_to(other);
		works("R16: of two functions at one address none answers");
		config_write(place.number + 1, 0x10, home);
		works("R16: the function does not work at the other's address");
		move_to(home);
		works("R16: the first of two functions does not answer");
		config_write(place.number + 1, 0x10, other);
		works("R16: the function does not come back");
	}
}
static void functions_that_there_are_not(void)
{
	for (u32 number = 0; number < 32; number++)
		for (u32 function = 0; function < 8; function++)
			for (u32 bus = 0; bus < 256; bus += 51) {
				outl(0xcf8, 1u << 31 | bus << 16 | number << 11 | function << 8);
				sink += inl(0xcfc);
				if (bus || function)
					outl(0xcfc, ~0u);
			}
}

/* Ports that end the machine are left out: ending itself is a guest's right. */
static bool ends_the_machine(u32 port)
{
	return (port >= 0x60 && port <= 0x64) || port == 0xf4 || (port >= 0x500 && port < 0x700) || port == 0xcf9 ||
	       (port >= 0x3f8 && port < 0x400) || port == 0x92;
}
static void all_ports(void)
{
	for (u32 port = 0; port < 0x1ff8; port++) {
		if (ends_the_machine(port) || ends_the_machine(port + 1) || ends_the_machine(port + 3))
			continue;
		sink += inb((u16)port);
		if (port % 16 == 0)
			sink += inw((u16)port) + inl((u16)port);
		/* PCI's own are attacked above, with care. */
		if (port % 8 == 0 && (port < 0xcf8 || port > 0xcff)) {
			outb((u16)port, 0xff);
			outl((u16)port, ~0u);
		}
	}
}
static void memory_that_there_is_not(void)
{
	static const u64 places[] = { 0xc0000000, 0xcffffff8, 0xd00ff000, 0xd1100000, 0xdffffff8, 0xe0100000, 0xeffffff8, 0xfec01000, 0xfed00000, 0xffbffff8 };
	for (u32 at = 0; at < sizeof places / sizeof *places; at++)
		for (u32 width = 1; width <= 8; width *= 2) {
			volatile u8 *here = (volatile u8 *)places[at];
			sink += read_of(here, width);
			write_of(here, width, ~0ull);
		}
}

static const struct attack all[] = {
	{ "R14", "set-up of a live queue", set_up_when_live, SELF },
	{ "R14", "a live queue enabled again", enabled_twice, SELF },
	{ "R14", "a queue disabled and set up anew with I/O in flight", disabled_with_io, SELF },
	{ "R14", "queues that there are not", queues_that_there_are_not, SELF },
	{ "R14", "doorbells of queues that there are not", doorbells_of_no_queue, SELF },
	{ "R14", "sizes that cannot be", sizes_that_cannot_be, SELF },
	{ "R14", "rings at places that cannot be", rings_that_cannot_be, SELF },
	{ "R14", "rings over each other", rings_over_each_other, SELF },
	{ "R16", "registers read in every width at every offset", registers_read, SELF },
	{ "R16", "configuration read in every width at every offset", configuration_read, SELF },
	{ "R16", "configuration written in every width at every offset", configuration_written, SELF },
	{ "R16", "ones to registers in every width at every offset", registers_of_ones, SELF },
	{ "R16", "zeroes to registers in every width at every offset", registers_of_zeroes, SELF },
	{ "R16", "a pattern to registers in every width at every offset", registers_of_a_pattern, SELF },
	{ "R16", "PCI configuration in every width", pci_configuration, SELF },
	{ "R16", "PCI regions moved onto memory and other devices", pci_region_moved, SELF },
	{ "R16", "a PCI function moved with requests in flight", pci_function_moved_at_work, SELF },
	{ "R16", "PCI functions over each other", pci_functions_over_each_other, SELF },
	{ "R16", "PCI functions that there are not", functions_that_there_are_not, SELF },
	{ "R16", "every port", all_ports, SELF },
	{ "R16", "addresses of nothing", memory_that_there_is_not, SELF },
};
const struct attacks registers = { all, sizeof all / sizeof *all };
