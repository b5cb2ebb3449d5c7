/* The same rules for the console's queues (virtio 5.3): rings that cannot be, buffers that are nowhere, resets. */
#include "attacks.h"

static void own_next(void) { put(table, 0, AT(DATA), 16, D_NEXT, 0); }
static void next_beyond(void) { put(table, 0, AT(DATA), 16, D_NEXT, 0xffff); }
static void buffer_outside(void) { CHAIN(table, { ram_end, 64, 0 }); }
static void room_outside(void) { CHAIN(table, { ~0ull - 16, 64, D_WRITE }); }
static void nothing_at_all(void) { CHAIN(table, { AT(DATA), 0, 0 }); }
static void both_directions(void) { CHAIN(table, { AT(DATA), 64, 0 }, { AT(DATA), 64, D_WRITE }); }
static void four_gigabytes(void) { CHAIN(table, { AT(DATA), ~0u, 0 }, { AT(DATA), ~0u, 0 }); }
static void nested_tables(void)
{
	put(table, 0, AT(indirect), 16, D_INDIRECT, 0);
	put(indirect, 0, AT(indirect), 16, D_INDIRECT, 0);
}
/* Control messages are id, event, value (virtio 5.3.6.2). */
static void control_messages(void)
{
	for (u32 at = 0; at < 64; at++)
		DATA[at] = (u8)(at * 37);
	CHAIN(table, { AT(DATA), 8, 0 });
}
static void half_a_message(void) { CHAIN(table, { AT(DATA), 3, 0 }); }

static void (*const attacks[])(void) = {
	own_next,	 next_beyond,	buffer_outside, room_outside,	  nothing_at_all,
	both_directions, four_gigabytes, nested_tables, control_messages, half_a_message,
};

static void wait_ms(u64 ms)
{
	for (u64 since = rdtsc(); !is_over(since, ms);)
		pause();
}

static void storm(u16 queue)
{
	for (u32 round = 0; round < 64; round++) {
		start();
		CHAIN(table, { AT(DATA), 64, round & 1 ? D_WRITE : 0 });
		offer_many(size);
		for (u32 i = 0; i < 20; i++)
			kick();
		if (round % 4 == 0)
			notify((u16)(queue + round));
		if (round % 8 == 0)
			available.idx = (u16)(available.idx + 0x4000), kick();
		reset();
	}
}

/* Its queues, each in turn; the runner looks at the disk afterwards. */
u32 attack_console(void)
{
	struct place found;
	u32 count = 0;
	if (!find_device(CONSOLE_DEVICE, 0, &found))
		return 0;
	for (u16 queue = 0; queue < 6; queue++) {
		attach(1, CONSOLE_DEVICE, 0, queue);
		/* Multiport, or not. */
		for (u32 with = 0; with < 2; with++)
			for (u32 at = 0; at < sizeof attacks / sizeof *attacks; at++) {
				begin(with ? offered_features : F_VERSION_1);
				if (!queue_max())
					continue;
				start_with(SMALL, with ? offered_features : F_VERSION_1);
				attacks[at]();
				offer(0);
				kick();
				for (u32 head = 0; head < 4; head++)
					offer((u16)(size + head * 0x1000 - 1));
				kick();
				wait_ms(2);
				count++;
			}
		select_queue(queue);
		if (queue_max())
			storm(queue);
		reset();
	}
	change_hands(0);
	return count;
}
