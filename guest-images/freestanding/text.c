/* Words out over COM1, words in from the command line, and the machine's end. */
#include "basics.h"

#define PORT_COM1 0x3f8
#define PORT_EXIT 0xf4

const char *command_line_text;

void print(const char *text)
{
	while (*text)
		outb(PORT_COM1, (u8)*text++);
}

static void print_digits(u64 number, u32 base)
{
	char digits[32];
	int at = sizeof digits - 1;
	digits[at] = 0;
	do {
		digits[--at] = "0123456789abcdef"[number % base];
		number /= base;
	} while (number);
	print(digits + at);
}

void print_number(const char *name, u64 number)
{
	print(" ");
	print(name);
	print("=");
	print_digits(number, 10);
}

void print_hex(const char *name, u64 number)
{
	print(" ");
	print(name);
	print("=0x");
	print_digits(number, 16);
}

/* Status (code << 1 | 1), of minivmm and of QEMU's isa-debug-exit. */
_Noreturn void end(u8 code)
{
	outb(PORT_EXIT, code);
	for (;;)
		pause();
}

_Noreturn void fail(const char *why)
{
	print(guest_name);
	print(": failed: ");
	print(why);
	print("\r\n");
	end(1);
}

const char *option(const char *name)
{
	const char *at = command_line_text;
	while (at && *at) {
		const char *word = at, *wanted = name;
		while (*wanted && *word == *wanted)
			word++, wanted++;
		if (!*wanted && *word == '=')
			return word + 1;
		while (*at && *at != ' ')
			at++;
		while (*at == ' ')
			at++;
	}
	return NULL;
}

u64 option_number(const char *name, u64 otherwise)
{
	const char *text = option(name);
	if (!text)
		return otherwise;
	u32 base = 10;
	u64 number = 0;
	if (text[0] == '0' && text[1] == 'x') {
		base = 16;
		text += 2;
	}
	for (; *text && *text != ' '; text++) {
		u32 digit = *text <= '9' ? (u32)(*text - '0') : (u32)((*text | 32) - 'a' + 10);
		if (digit >= base)
			fail("a number on the command line cannot be read");
		number = number * base + digit;
	}
	return number;
}

bool option_is(const char *name, const char *value)
{
	const char *text = option(name);
	if (!text)
		return false;
	while (*value && *text == *value)
		text++, value++;
	return !*value && (!*text || *text == ' ');
}
