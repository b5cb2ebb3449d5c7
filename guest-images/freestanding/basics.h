/* What guests without a kernel share. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* The guest's: its name in messages, and what it does with the command line. */
extern const char guest_name[];
void run(const char *command_line);

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

/* find.c: where a virtio device's registers are: virtio-mmio's, or the parts of a PCI function's region. */
struct place {
	bool is_pci;
	/* The function's device number on bus 0. */
	u32 number;
	volatile u8 *mmio;
	volatile u8 *common, *notify, *isr;
	u32 notify_multiplier;
	/* Either transport's device configuration. */
	volatile u8 *device;
};

/* The device of this type with this number, from 0 on, that `transport=`, `mmio=`, `mmio_count=` and
 * `mmio_step=` lead to. */
bool find_device(u32 type, u32 nth, struct place *place);
u32 config_read(u32 number, u32 at);
void config_write(u32 number, u32 at, u32 value);

static inline u8 read8(volatile u8 *at) { return *at; }
static inline u16 read16(volatile u8 *at) { return *(volatile u16 *)at; }
static inline u32 read32(volatile u8 *at) { return *(volatile u32 *)at; }
static inline u64 read64(volatile u8 *at) { return *(volatile u64 *)at; }
static inline void write8(volatile u8 *at, u8 value) { *at = value; }
static inline void write16(volatile u8 *at, u16 value) { *(volatile u16 *)at = value; }
static inline void write32(volatile u8 *at, u32 value) { *(volatile u32 *)at = value; }
static inline void write64(volatile u8 *at, u64 value) { *(volatile u64 *)at = value; }

#define PORT(width, suffix) \
	static inline void out##suffix(u16 port, u##width value) \
	{ \
		__asm__ volatile("out" #suffix " %0, %1" : : "a"(value), "Nd"(port)); \
	} \
	static inline u##width in##suffix(u16 port) \
	{ \
		u##width value; \
		__asm__ volatile("in" #suffix " %1, %0" : "=a"(value) : "Nd"(port)); \
		return value; \
	}
PORT(8, b)
PORT(16, w)
PORT(32, l)
#undef PORT

static inline u64 rdtsc(void)
{
	u32 low, high;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

#define barrier() __asm__ volatile("" : : : "memory")
#define fence() __asm__ volatile("lock orl $0, (%%rsp)" : : : "memory", "cc")
#define pause() __asm__ volatile("pause" : : : "memory")
