/* Where virtio devices are: PCI's capabilities, or places on the command line. */
#include "basics.h"

#define MAGIC 0x74726976
#define VENDOR 0x1af4
#define DEVICE_0 0x1040
/* A transitional block device's. */
#define LEGACY_BLOCK 0x1001

/* PCI configuration by ports: function 0 of device NUMBER on bus 0. */
u32 config_read(u32 number, u32 at)
{
	outl(0xcf8, 1u << 31 | number << 11 | (at & ~3u));
	return inl(0xcfc);
}

void config_write(u32 number, u32 at, u32 value)
{
	outl(0xcf8, 1u << 31 | number << 11 | (at & ~3u));
	outl(0xcfc, value);
}

static u64 bar(u32 number, u32 index)
{
	u32 low = config_read(number, 0x10 + 4 * index);
	u64 high = (low & 6) == 4 ? config_read(number, 0x14 + 4 * index) : 0;
	u64 address = high << 32 | (low & ~15u);
	if (!address || address >> 32)
		fail("a base address register holds no address below 4 GiB");
	return address;
}

static void walk_capabilities(struct place *place)
{
	u32 number = place->number;
	for (u32 at = config_read(number, 0x34) & 0xfc; at; at = config_read(number, at) >> 8 & 0xfc) {
		u32 head = config_read(number, at);
		if ((head & 0xff) != 9)
			continue;
		u32 kind = head >> 24, index = config_read(number, at + 4) & 0xff;
		if (kind < 1 || kind > 4)
			continue;
		volatile u8 *part = (volatile u8 *)(bar(number, index) + config_read(number, at + 8));
		if (kind == 1)
			place->common = part;
		else if (kind == 2)
			place->notify = part, place->notify_multiplier = config_read(number, at + 16);
		else if (kind == 3)
			place->isr = part;
		else
			place->device = part;
	}
}

static bool find_pci(u32 type, u32 nth, struct place *place)
{
	for (u32 number = 0; number < 32; number++) {
		u32 id = config_read(number, 0);
		if (id != ((DEVICE_0 + type) << 16 | VENDOR) && !(type == 2 && id == (LEGACY_BLOCK << 16 | VENDOR)))
			continue;
		if (nth--)
			continue;
		config_write(number, 4, (config_read(number, 4) & 0xffff) | 6);
		*place = (struct place){ .is_pci = true, .number = number };
		walk_capabilities(place);
		if (!place->common || !place->notify || !place->device)
			fail("the PCI function lacks a capability");
		return true;
	}
	return false;
}

/* minivmm's first place, then QEMU microvm's places. */
static bool find_mmio(u32 type, u32 nth, struct place *place)
{
	u64 base = option_number("mmio", 0), step = option_number("mmio_step", 0x1000);
	u64 count = option_number("mmio_count", 1);
	for (u64 i = 0; base && i < count; i++) {
		volatile u8 *at = (volatile u8 *)(base + i * step);
		if (read32(at) == MAGIC && read32(at + 4) == 2 && read32(at + 8) == type && !nth--) {
			*place = (struct place){ .mmio = at, .device = at + 0x100 };
			return true;
		}
	}
	return false;
}

bool find_device(u32 type, u32 nth, struct place *place)
{
	return option_is("transport", "pci") ? find_pci(type, nth, place) : find_mmio(type, nth, place);
}
