/* What the parts of the benchmark guest share. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* text.c: COM1, and words of the command line. */
void print(const char *text);
void print_number(const char *name, u64 number);
void print_hex(const char *name, u64 number);
_Noreturn void end(u8 code);
_Noreturn void fail(const char *why);
/* The text behind NAME= on the command line, or NULL. */
const char *option(const char *name);
u64 option_number(const char *name, u64 otherwise);
bool option_is(const char *name, const char *value);
extern const char *command_line_text;

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

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u32 inl(u16 port)
{
	u32 value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline u64 rdtsc(void)
{
	u32 low, high;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

#define barrier() __asm__ volatile("" : : : "memory")
#define fence() __asm__ volatile("lock orl $0, (%%rsp)" : : : "memory", "cc")
#define pause() __asm__ volatile("pause" : : : "memory")
