/* The hostile guest's hold on one device: every register and every byte of its rings. */
#pragma once

#include "basics.h"

enum { BLOCK_DEVICE = 2, CONSOLE_DEVICE = 3 };
enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
enum { D_NEXT = 1, D_WRITE = 2, D_INDIRECT = 4 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2, UNTOUCHED = 0xaa };

#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_VERSION_1 (1ull << 32)

/* The smallest ring that all attacks fit into, and the largest. */
#define SMALL 16
#define LARGE 256

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct header { u32 kind, reserved; u64 sector; };
struct used_entry { u32 id, length; };

/* The rings of one device, on pages of their own. */
struct rings {
	struct descriptor table[LARGE] __attribute__((aligned(4096)));
	struct { u16 flags, idx, ring[LARGE + 1]; } available __attribute__((aligned(4096)));
	struct { u16 flags, idx; struct used_entry ring[LARGE + 1]; } used __attribute__((aligned(4096)));
};
#define DEVICES 2
extern volatile struct rings rings_of[DEVICES];
/* Which device is in hand. */
extern u32 in_hand;
#define table ((struct descriptor *)rings_of[in_hand].table)
#define available (rings_of[in_hand].available)
#define used (rings_of[in_hand].used)

/* What an attack may use besides: all of it is the guest's own memory. */
extern struct descriptor indirect[4 * LARGE];
extern struct header header;
extern volatile u8 status[16];
extern u8 pattern[512];
/* MiB of memory for data. */
#define DATA ((u8 *)(32u << 20))
#define DATA_BYTES (32u << 20)
/* The guest's memory ends here. */
extern u64 ram_end;
/* Of the block device: what it offers, its size. */
extern u64 offered_features, capacity;
extern struct place place;
/* The size of the queue that is in use. */
extern u16 size;

/* What a request came to. */
enum outcome { OK = 1, IOERR = 2, UNSUPP = 4, BROKEN = 8, NOTHING = 16, ANSWERED = OK | IOERR | UNSUPP, ANY = ANSWERED | BROKEN };
const char *outcome_name(enum outcome outcome);

/* Takes device NTH of this type into hand HAND, with this queue. */
void attach(u32 hand, u32 type, u32 nth, u16 queue);
/* Goes on with what is in the other hand. */
void change_hands(u32 hand);

/* Registers. */
u8 get_status(void);
void set_status(u8 value);
void select_queue(u16 queue);
u16 queue_max(void);
void set_queue_size(u16 value);
enum part { TABLE, AVAILABLE, USED };
void set_queue_address(enum part part, u64 address);
void set_queue_ready(u16 value);
u64 offered(void);
void take_features(u64 bits);
void notify(u16 queue);

/* Resets and waits until the device says that it is; a device that does not come back is the end. */
void reset(void);
/* Reset, features, a queue of ENTRIES, DRIVER_OK. */
void start_with(u16 entries, u64 features);
void start(void);
/* Up to the queue's set-up, for those who want to do that themselves. */
void begin(u64 features);

/* Ring contents. */
void put(struct descriptor *to, u16 at, u64 address, u32 length, u16 flags, u16 next);
struct piece { u64 address; u32 length; u16 flags; };
/* From descriptor FIRST on, each the next of the one before. */
void put_pieces(struct descriptor *to, u16 first, const struct piece *pieces, u32 count);
#define CHAIN(to, ...) \
	put_pieces(to, 0, (struct piece[]){ __VA_ARGS__ }, sizeof((struct piece[]){ __VA_ARGS__ }) / sizeof(struct piece))
#define AT(memory) ((u64)(memory))
void put_header(u32 kind, u64 sector);
void offer(u16 head);
/* Makes descriptor 0 available COUNT times. */
void offer_many(u16 count);
void kick(void);

/* The next answer; false if the ring is broken instead. More bytes than were writable are the end. */
bool wait_used(struct used_entry *entry);
/* What became of the one request whose status byte is status[0]. */
enum outcome outcome(void);
/* Whether the device asks to be reset. */
bool is_broken(void);
/* How many bytes the chain that is offered may be written at most; wait_used() checks it. */
extern u64 writable_max;

/* A transfer of the block device's, and its outcome. */
enum outcome transfer(u32 kind, u64 sector, void *data, u32 bytes);

/* The clock: whether so many milliseconds have passed since. */
bool is_over(u64 since, u64 ms);
