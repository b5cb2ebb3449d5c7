/*
 * Answers minivmm's questions about the guest's caches and disks (--observe).
 *
 * Owns the line: from /proc/meminfo, in KiB, "cached N buffers N shmem N dirty N writeback N", and from
 * /sys/block/vdX/stat for each disk "disk NAME READS SECTORS WRITES SECTORS FLUSHES" ("-" where the
 * kernel does not count FLUSHes). Each byte that comes on the port is a question. Between questions it
 * sleeps; it opens no disk, and allocates nothing while it answers.
 */
#define _GNU_SOURCE
#define PROGRAM "minivmm-observe"
#include "ports.h"

#define DISKS_MAX 26

static char text[8192], line[4096];
static size_t length;

static void add(const char *word)
{
	length += snprintf(line + length, sizeof line - length, "%s%s", length ? " " : "", word);
	if (length >= sizeof line)
		length = sizeof line - 1;
}

/* The whole of a small file of the kernel's, in `text`. */
static bool read_text(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t count = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[count > 0 ? count : 0] = 0;
	return count > 0;
}

static void add_meminfo(const char *key, const char *name)
{
	char *found = strstr(text, key), number[24];
	unsigned long long kib = 0;
	if (found)
		kib = strtoull(found + strlen(key), NULL, 10);
	snprintf(number, sizeof number, "%llu", kib);
	add(name);
	add(number);
}

/* Fields 1, 3, 5, 7 and 16 of Documentation/block/stat.rst. */
static void add_disk(const char *name)
{
	char path[64], *rest, *field;
	snprintf(path, sizeof path, "/sys/block/%s/stat", name);
	if (!read_text(path))
		return;
	add("disk");
	add(name);
	rest = text;
	for (int number = 1; number <= 16; number++) {
		field = strtok_r(number == 1 ? text : NULL, " \n", &rest);
		if (number == 1 || number == 3 || number == 5 || number == 7 || number == 16)
			add(field ? field : "-");
	}
}

static void answer(int port)
{
	length = 0;
	if (!read_text("/proc/meminfo"))
		die("/proc/meminfo");
	/* "Cached:" is the end of "SwapCached:" too. */
	add_meminfo("\nCached:", "cached");
	add_meminfo("\nBuffers:", "buffers");
	add_meminfo("\nShmem:", "shmem");
	add_meminfo("\nDirty:", "dirty");
	add_meminfo("\nWriteback:", "writeback");
	for (char letter = 'a'; letter < 'a' + DISKS_MAX; letter++) {
		char name[] = { 'v', 'd', letter, 0 };
		add_disk(name);
	}
	line[length++] = '\n';
	for (size_t done = 0; done < length;) {
		ssize_t count = write(port, line + done, length - done);
		if (count < 0 && errno != EINTR)
			die("observe port");
		if (count > 0)
			done += count;
	}
}

int main(void)
{
	int port = open_port("org.minivmm.observe", O_RDWR);
	for (;;) {
		char question;
		ssize_t count = read(port, &question, 1);
		if (count == 1)
			answer(port);
		else if (count < 0 && errno != EINTR)
			die("observe port");
		else if (count == 0)
			doze_ms(100);
	}
}
