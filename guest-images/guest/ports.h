/*
 * Ports of minivmm's console device, by their names. Owns the wait for one, and the way to say that
 * something cannot be had. PROGRAM is the name of whoever includes it.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PORTS "/sys/class/virtio-ports"
#define WAIT_MS_MAX 20000

static void die(const char *what)
{
	fprintf(stderr, PROGRAM ": %s: %s\n", what, strerror(errno));
	exit(1);
}

static void doze_ms(long ms)
{
	struct timespec time = { ms / 1000, ms % 1000 * 1000000 };
	nanosleep(&time, NULL);
}

/* Whether /sys/class/virtio-ports/ENTRY/name says NAME. */
static bool has_name(const char *entry, const char *name)
{
	char path[512], found[64] = "";
	snprintf(path, sizeof path, PORTS "/%s/name", entry);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t count = read(fd, found, sizeof found - 1);
	close(fd);
	if (count > 0 && found[count - 1] == '\n')
		found[count - 1] = 0;
	return strcmp(found, name) == 0;
}

/* Opens the port of that name as soon as it is there; the driver learns of its ports one by one. */
static int open_port(const char *name, int flags)
{
	for (int waited = 0; waited < WAIT_MS_MAX; waited++, doze_ms(1)) {
		DIR *ports = opendir(PORTS);
		struct dirent *entry;
		while (ports && (entry = readdir(ports))) {
			char path[512];
			if (!has_name(entry->d_name, name))
				continue;
			snprintf(path, sizeof path, "/dev/%s", entry->d_name);
			int fd = open(path, flags | O_CLOEXEC);
			if (fd >= 0) {
				closedir(ports);
				return fd;
			}
		}
		if (ports)
			closedir(ports);
	}
	errno = ENODEV;
	die(name);
	return -1;
}
