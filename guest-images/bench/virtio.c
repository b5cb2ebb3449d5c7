/*
 * A virtio-blk driver for one queue, over virtio-mmio or virtio-pci (modern), that polls: it takes no
 * interrupts, and rings the doorbell only where the device asks for it (EVENT_IDX, or the flags). One
 * indirect descriptor a request, as Linux does it, where the device has INDIRECT_DESC.
 */
#include "guest.h"

#define QUEUE_MAX 256
#define SLOTS_MAX 128
#define BLOCK_DEVICE 2

#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_VERSION_1 (1ull << 32)
#define F_FLUSH (1ull << 9)
#define F_CONFIG_WCE (1ull << 11)
#define WANTED (F_INDIRECT | F_EVENT_IDX | F_VERSION_1 | F_FLUSH | F_CONFIG_WCE)

enum { D_NEXT = 1, D_WRITE = 2, D_INDIRECT = 4 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct header { u32 kind, reserved; u64 sector; };

/* The rings and what requests need besides their data. */
static struct descriptor table[QUEUE_MAX] __attribute__((aligned(4096)));
static struct { u16 flags, idx, ring[QUEUE_MAX], used_event; } available __attribute__((aligned(4096)));
static struct { u16 flags, idx; struct { u32 id, length; } ring[QUEUE_MAX]; u16 avail_event; } used
	__attribute__((aligned(4096)));
static struct descriptor indirect[SLOTS_MAX][4] __attribute__((aligned(64)));
static struct header headers[SLOTS_MAX] __attribute__((aligned(64)));
static volatile u8 statuses[SLOTS_MAX];

u64 doorbells;
static u64 features;
static u16 size, next_available, published, next_used;
static u64 capacity;
static bool over_pci;

static volatile u8 *mmio, *common, *device;
static volatile void *doorbell;

static void set_status(u8 status)
{
	if (over_pci)
		common[0x14] = status;
	else
		write32(mmio + 0x70, status);
}

static u8 get_status(void) { return over_pci ? common[0x14] : (u8)read32(mmio + 0x70); }

static u64 offered(void)
{
	u64 bits = 0;
	for (u32 half = 0; half < 2; half++) {
		write32(over_pci ? common : mmio + 0x14, half);
		bits |= (u64)read32(over_pci ? common + 4 : mmio + 0x10) << 32 * half;
	}
	return bits;
}

static void take(u64 bits)
{
	for (u32 half = 0; half < 2; half++) {
		write32(over_pci ? common + 8 : mmio + 0x24, half);
		write32(over_pci ? common + 12 : mmio + 0x20, (u32)(bits >> 32 * half));
	}
}

static void set_address(u32 pci_at, u32 mmio_at, const volatile void *address)
{
	volatile u8 *at = over_pci ? common + pci_at : mmio + mmio_at;
	write32(at, (u32)(u64)address);
	write32(at + 4, 0);
}

static void set_up_queue(void)
{
	u32 max;
	if (over_pci) {
		write16(common + 0x16, 0);
		max = read16(common + 0x18);
	} else {
		write32(mmio + 0x30, 0);
		max = read32(mmio + 0x34);
	}
	size = max < QUEUE_MAX ? (u16)max : QUEUE_MAX;
	if (size < 4)
		fail("the queue is too small");
	if (over_pci)
		write16(common + 0x18, size);
	else
		write32(mmio + 0x38, size);
	set_address(0x20, 0x80, table);
	set_address(0x28, 0x90, &available);
	set_address(0x30, 0xa0, &used);
	if (over_pci)
		write16(common + 0x1c, 1);
	else
		write32(mmio + 0x44, 1);
}

/* used_event and avail_event lie behind `size` entries, wherever that is. */
static volatile u16 *used_event(void) { return (volatile u16 *)&available.ring[size]; }
static volatile u16 *avail_event(void) { return (volatile u16 *)&used.ring[size]; }

void bring_up(void)
{
	struct place place;
	if (!find_device(BLOCK_DEVICE, 0, &place))
		fail("there is no block device");
	over_pci = place.is_pci, mmio = place.mmio, common = place.common, device = place.device;
	if (over_pci) {
		write16(common + 0x16, 0);
		doorbell = place.notify + read16(common + 0x1e) * place.notify_multiplier;
	} else {
		doorbell = mmio + 0x50;
	}
	set_status(0);
	while (get_status())
		pause();
	set_status(ACKNOWLEDGE);
	set_status(ACKNOWLEDGE | DRIVER);
	features = offered() & WANTED;
	if (!(features & F_VERSION_1) || !(features & F_FLUSH))
		fail("the device lacks VERSION_1 or FLUSH");
	take(features);
	set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
	if (!(get_status() & FEATURES_OK))
		fail("the device refuses the features");
	set_up_queue();
	available.flags = 1;
	set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
	capacity = (u64)read32(device + 4) << 32 | read32(device);
}

u64 capacity_sectors(void) { return capacity; }
const char *transport_name(void) { return over_pci ? "pci" : "mmio"; }

void submit(u32 slot, u32 kind, u64 sector, void *data, u32 bytes)
{
	bool is_indirect = features & F_INDIRECT;
	struct descriptor *chain = is_indirect ? indirect[slot] : table + 3 * slot;
	u16 first = is_indirect ? 0 : (u16)(3 * slot), count = 0;
	headers[slot] = (struct header){ kind, 0, sector };
	statuses[slot] = 0xaa;
	chain[count++] = (struct descriptor){ (u64)&headers[slot], sizeof(struct header), D_NEXT, (u16)(first + 1) };
	if (bytes) {
		u16 flags = D_NEXT | (kind == IN ? D_WRITE : 0);
		chain[count++] = (struct descriptor){ (u64)data, bytes, flags, (u16)(first + 2) };
	}
	chain[count++] = (struct descriptor){ (u64)&statuses[slot], 1, D_WRITE, 0 };
	if (is_indirect)
		table[slot] = (struct descriptor){ (u64)chain, 16u * count, D_INDIRECT, 0 };
	available.ring[next_available++ & (size - 1)] = is_indirect ? (u16)slot : first;
	barrier();
	*(volatile u16 *)&available.idx = next_available;
}

void kick(void)
{
	if (published == next_available)
		return;
	fence();
	bool wanted;
	if (features & F_EVENT_IDX)
		wanted = (u16)(next_available - *avail_event() - 1) < (u16)(next_available - published);
	else
		wanted = !(*(volatile u16 *)&used.flags & 1);
	published = next_available;
	if (!wanted)
		return;
	doorbells++;
	if (over_pci)
		*(volatile u16 *)doorbell = 0;
	else
		*(volatile u32 *)doorbell = 0;
}

int reap(void)
{
	if (*(volatile u16 *)&used.idx == next_used)
		return -1;
	barrier();
	u32 id = used.ring[next_used++ & (size - 1)].id;
	/* Far behind what the device will publish next: no interrupt is asked for. */
	*used_event() = (u16)(next_used - 2);
	u32 slot = features & F_INDIRECT ? id : id / 3;
	if (slot >= SLOTS_MAX)
		fail("the used ring names a chain that there is not");
	return (int)slot;
}

u8 status_of(u32 slot) { return statuses[slot]; }
