/*
 * Writes numbered, checksummed records to a disk, one at a time past the guest's own cache, and says
 * what is written and what is flushed, so that whoever has heard it can hold the disk to it.
 *
 * Usage: records DEVICE FLUSH_EVERY SECONDS [FIRST]. FLUSH_EVERY 0 never asks for a flush. The first FIRST MiB are
 * not touched; of what follows, record n is a block of 4 KiB at block (n * 7919) mod blocks, each block at most once: "RECORDMV", n, its block and a CRC-32 of
 * all before it, little endian; the rest is n again and again. On standard output, a line each:
 *   declares back|through   what the disk says of its write cache
 *   w N                     records 1 to N are written (said every eighth, and at a flush)
 *   f N                     records 1 to N are flushed
 *   end N
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define SAID_EVERY 8

static void die(const char *what)
{
	printf("failed: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint32_t crc32(const unsigned char *bytes, size_t count)
{
	uint32_t crc = ~0u;
	for (size_t i = 0; i < count; i++) {
		crc ^= bytes[i];
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
	}
	return ~crc;
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void declare(const char *device)
{
	char path[256], text[32] = "";
	const char *name = strrchr(device, '/');
	snprintf(path, sizeof path, "/sys/block/%s/queue/write_cache", name ? name + 1 : device);
	FILE *file = fopen(path, "r");
	if (!file || !fgets(text, sizeof text, file))
		die(path);
	fclose(file);
	printf("declares %s\n", strstr(text, "back") ? "back" : "through");
}

int main(int argc, char **argv)
{
	if (argc != 4 && argc != 5)
		return 2;
	off_t first = argc == 5 ? (off_t)(strtoull(argv[4], NULL, 10) << 20) : 0;
	setvbuf(stdout, NULL, _IOLBF, 0);
	uint64_t flush_every = strtoull(argv[2], NULL, 10);
	double until = now() + atof(argv[3]);
	int fd = open(argv[1], O_RDWR | O_DIRECT);
	off_t bytes = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
	if (bytes < first + BLOCK)
		die(argv[1]);
	declare(argv[1]);
	uint64_t blocks = (uint64_t)(bytes - first) / BLOCK, n = 0;
	unsigned char *block = aligned_alloc(BLOCK, BLOCK);
	while (n < blocks && now() < until) {
		n++;
		uint64_t at = n * 7919 % blocks;
		for (int i = 0; i < BLOCK; i += 8)
			memcpy(block + i, &n, 8);
		memcpy(block, "RECORDMV", 8);
		memcpy(block + 16, &at, 8);
		uint32_t sum = crc32(block, 24);
		memcpy(block + 24, &sum, 4);
		if (pwrite(fd, block, BLOCK, first + (off_t)(at * BLOCK)) != BLOCK)
			die("pwrite");
		int flushes = flush_every && n % flush_every == 0;
		if (n % SAID_EVERY == 0 || flushes)
			printf("w %llu\n", (unsigned long long)n);
		if (flushes) {
			if (fdatasync(fd))
				die("fdatasync");
			printf("f %llu\n", (unsigned long long)n);
		}
	}
	printf("end %llu\n", (unsigned long long)n);
	/* What comes after is no concern of ours: the host is killed meanwhile. */
	for (;;)
		pause();
}
