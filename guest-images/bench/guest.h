/* What the parts of the benchmark guest share. */
#pragma once

#include "basics.h"

/* virtio.c: one block device with one queue, found and brought up. */
enum { IN = 0, OUT = 1, FLUSH = 4 };

void bring_up(void);
u64 capacity_sectors(void);
const char *transport_name(void);
/* Puts a request into SLOT's descriptors and makes it available; the device hears of it by kick(). */
void submit(u32 slot, u32 kind, u64 sector, void *data, u32 bytes);
/* Rings the doorbell if the device asks for it. */
void kick(void);
/* A slot whose request is done, or -1. */
int reap(void);
/* The status byte of a request that is done. */
u8 status_of(u32 slot);
extern u64 doorbells;
