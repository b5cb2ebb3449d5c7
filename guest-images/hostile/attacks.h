/* The attacks, by what they attack. */
#pragma once

#include "device.h"

/* One attack: PREPARE fills descriptors from 0 on; the runner offers them, or, where EXPECTED is SELF, the attack
 * does all of it. */
struct attack {
	/* The rule of docs/requirements.md that it tries to break, "R1". */
	const char *rule;
	const char *name;
	void (*prepare)(void);
	/* The outcomes that are right; 0: the attack judges itself. */
	u32 expected;
};
enum { SELF = 0 };

struct attacks {
	const struct attack *all;
	u32 count;
};

extern const struct attacks chains, requests, rings, registers;
/* console.c: the same for the queues of a virtio-console, if there is one; how many. */
u32 attack_console(void);

/* serve.c */
u8 read_console(void);
_Noreturn void serve(void);
