/*
 * A driver that keeps to no rule unless it wants to: virtio-mmio and virtio-pci registers, and one queue in
 * memory that attacks fill as they like. Polls; takes no interrupts; rings the doorbell always.
 */
#include "device.h"

/* A device that has not answered by then hangs. */
#define PATIENCE_MS 30000

volatile struct rings rings_of[DEVICES];
u32 in_hand;
struct descriptor indirect[4 * LARGE] __attribute__((aligned(4096)));
struct header header __attribute__((aligned(64)));
volatile u8 status[16] __attribute__((aligned(64)));
u8 pattern[512];
u64 ram_end, offered_features, capacity, writable_max;
u16 size;
struct place place;

static u16 own_queue, next_used;

/* What is put down when hands change. */
static struct {
	struct place place;
	u64 offered_features, capacity;
	u16 size, own_queue, next_used;
} put_down[DEVICES];

void change_hands(u32 hand)
{
	put_down[in_hand].place = place;
	put_down[in_hand].offered_features = offered_features;
	put_down[in_hand].capacity = capacity;
	put_down[in_hand].size = size;
	put_down[in_hand].own_queue = own_queue;
	put_down[in_hand].next_used = next_used;
	in_hand = hand;
	place = put_down[hand].place;
	offered_features = put_down[hand].offered_features;
	capacity = put_down[hand].capacity;
	size = put_down[hand].size;
	own_queue = put_down[hand].own_queue;
	next_used = put_down[hand].next_used;
}

bool is_over(u64 since, u64 ms)
{
	static u64 khz;
	if (!khz)
		khz = option_number("tsc_khz", 1000000);
	return rdtsc() - since > ms * khz;
}

/* Registers: virtio 4.1.4.3 and 4.2.2. */

u8 get_status(void) { return place.is_pci ? read8(place.common + 0x14) : (u8)read32(place.mmio + 0x70); }

void set_status(u8 value)
{
	if (place.is_pci)
		write8(place.common + 0x14, value);
	else
		write32(place.mmio + 0x70, value);
}

void select_queue(u16 queue)
{
	if (place.is_pci)
		write16(place.common + 0x16, queue);
	else
		write32(place.mmio + 0x30, queue);
}

u16 queue_max(void) { return place.is_pci ? read16(place.common + 0x18) : (u16)read32(place.mmio + 0x34); }

void set_queue_size(u16 value)
{
	if (place.is_pci)
		write16(place.common + 0x18, value);
	else
		write32(place.mmio + 0x38, value);
}

void set_queue_address(enum part part, u64 address)
{
	volatile u8 *at = place.is_pci ? place.common + 0x20 + 8 * part : place.mmio + 0x80 + 16 * part;
	write32(at, (u32)address);
	write32(at + 4, (u32)(address >> 32));
}

void set_queue_ready(u16 value)
{
	if (place.is_pci)
		write16(place.common + 0x1c, value);
	else
		write32(place.mmio + 0x44, value);
}

u64 offered(void)
{
	u64 bits = 0;
	for (u32 half = 0; half < 2; half++) {
		write32(place.is_pci ? place.common : place.mmio + 0x14, half);
		bits |= (u64)read32(place.is_pci ? place.common + 4 : place.mmio + 0x10) << 32 * half;
	}
	return bits;
}

void take_features(u64 bits)
{
	for (u32 half = 0; half < 2; half++) {
		write32(place.is_pci ? place.common + 8 : place.mmio + 0x24, half);
		write32(place.is_pci ? place.common + 12 : place.mmio + 0x20, (u32)(bits >> 32 * half));
	}
}

void notify(u16 queue)
{
	if (place.is_pci)
		write16(place.notify + queue * place.notify_multiplier, queue);
	else
		write32(place.mmio + 0x50, queue);
}

/* From nothing to a live queue. */

void attach(u32 hand, u32 type, u32 nth, u16 queue)
{
	change_hands(hand);
	if (!find_device(type, nth, &place))
		fail("the device is not there");
	own_queue = queue;
	reset();
	set_status(ACKNOWLEDGE | DRIVER);
	offered_features = offered();
	if (type == 2)
		capacity = (u64)read32(place.device + 4) << 32 | read32(place.device);
}

void reset(void)
{
	u64 since = rdtsc();
	set_status(0);
	while (get_status())
		if (is_over(since, PATIENCE_MS))
			fail("a reset does not end");
}

void begin(u64 features)
{
	reset();
	set_status(ACKNOWLEDGE);
	set_status(ACKNOWLEDGE | DRIVER);
	take_features(features & offered_features);
	set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
	if (!(get_status() & FEATURES_OK))
		fail("the device refuses the features");
	for (u32 at = 0; at < LARGE; at++)
		table[at] = (struct descriptor){ 0 };
	available.flags = 1;
	available.idx = 0;
	used.flags = 0;
	used.idx = 0;
	next_used = 0;
	select_queue(own_queue);
}

void start_with(u16 entries, u64 features)
{
	begin(features);
	size = queue_max() < entries ? queue_max() : entries;
	set_queue_size(size);
	set_queue_address(TABLE, AT(table));
	set_queue_address(AVAILABLE, AT(&available));
	set_queue_address(USED, AT(&used));
	set_queue_ready(1);
	set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
	if (get_status() & NEEDS_RESET)
		fail("the device refuses a good queue");
}

void start(void) { start_with(SMALL, offered_features & ~F_EVENT_IDX); }

/* Ring contents. */

void put(struct descriptor *to, u16 at, u64 address, u32 length, u16 flags, u16 next)
{
	to[at] = (struct descriptor){ address, length, flags, next };
}

void put_pieces(struct descriptor *to, u16 first, const struct piece *pieces, u32 count)
{
	writable_max = 0;
	for (u32 i = 0; i < count; i++) {
		u16 next = (u16)(first + i + 1);
		bool is_last = i + 1 == count;
		put(to, (u16)(first + i), pieces[i].address, pieces[i].length,
		    is_last ? pieces[i].flags : pieces[i].flags | D_NEXT, is_last ? 0 : next);
		if (pieces[i].flags & D_WRITE)
			writable_max += pieces[i].length;
	}
}

void put_header(u32 kind, u64 sector) { header = (struct header){ kind, 0, sector }; }

void offer(u16 head)
{
	u16 at = available.idx;
	available.ring[at & (size - 1)] = head;
	barrier();
	available.idx = (u16)(at + 1);
}

void offer_many(u16 count)
{
	u16 at = available.idx;
	for (u16 i = 0; i < count; i++)
		available.ring[(u16)(at + i) & (size - 1)] = 0;
	barrier();
	available.idx = (u16)(at + count);
}

void kick(void)
{
	fence();
	notify(own_queue);
}

bool is_broken(void) { return get_status() & NEEDS_RESET; }

bool wait_used(struct used_entry *entry)
{
	u64 since = rdtsc();
	for (u32 look = 0; used.idx == next_used; look++) {
		pause();
		/* A look at the status is an exit from the guest, and costs. */
		if (look % 256 == 255 && is_broken() && used.idx == next_used)
			return false;
		if (is_over(since, PATIENCE_MS))
			fail("no answer");
	}
	barrier();
	entry->id = used.ring[next_used & (size - 1)].id;
	entry->length = used.ring[next_used & (size - 1)].length;
	next_used++;
	if (entry->length > writable_max)
		fail("R20: used.len is more than there was to write");
	return true;
}

enum outcome outcome(void)
{
	struct used_entry entry;
	if (!wait_used(&entry))
		return BROKEN;
	switch (status[0]) {
	case S_OK:
		return OK;
	case S_IOERR:
		return IOERR;
	case S_UNSUPP:
		return UNSUPP;
	default:
		return NOTHING;
	}
}

const char *outcome_name(enum outcome outcome)
{
	return outcome == OK	   ? "OK"
	       : outcome == IOERR  ? "IOERR"
	       : outcome == UNSUPP ? "UNSUPP"
	       : outcome == BROKEN ? "the device asks for a reset"
				   : "no status";
}

enum outcome transfer(u32 kind, u64 sector, void *data, u32 bytes)
{
	put_header(kind, sector);
	status[0] = UNTOUCHED;
	if (bytes)
		CHAIN(table, { AT(&header), 16, 0 }, { AT(data), bytes, kind == IN ? D_WRITE : 0 }, { AT(&status[0]), 1, D_WRITE });
	else
		CHAIN(table, { AT(&header), 16, 0 }, { AT(&status[0]), 1, D_WRITE });
	offer(0);
	kick();
	return outcome();
}
