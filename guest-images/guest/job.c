/*
 * Runs the command that minivmm was given as the guest's only job.
 *
 * Owns the way between the command's three standard streams, which are pipes as in any shell, and
 * minivmm's ports; the command's start; and the report of its end, which goes out when everything
 * that the command has written has. What is to be run is in /job: argv and env (strings, each
 * ended by a NUL) and workdir; promised, a record for each file that was added; and end, which is unpacked
 * last. A kernel with too little memory for all of it leaves files out without stopping: then nothing is run.
 * How the guest ends is init's business.
 *
 * On the control port, a line each: "arrived", "started", then one of "exited STATUS", "killed SIGNAL",
 * "failed find|exec|workdir ERRNO"; or "arrived", "incomplete MISSING PROMISED". minivmm answers the last with
 * "ok".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROGRAM "minivmm-job"
#include "ports.h"

#define CHUNK 65536

static char *read_all(const char *path, size_t *size)
{
	struct stat stat;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &stat) < 0)
		die(path);
	char *bytes = malloc(stat.st_size + 1);
	size_t have = 0;
	while (bytes && have < (size_t)stat.st_size) {
		ssize_t count = read(fd, bytes + have, stat.st_size - have);
		if (count <= 0)
			die(path);
		have += count;
	}
	if (!bytes)
		die(path);
	bytes[have] = 0;
	close(fd);
	*size = have;
	return bytes;
}

/* The strings of a file, as execve wants them. */
static char **read_strings(const char *path)
{
	size_t size, count = 0;
	char *bytes = read_all(path, &size);
	for (size_t at = 0; at < size; at++)
		count += bytes[at] == 0;
	char **strings = calloc(count + 1, sizeof *strings);
	if (!strings)
		die(path);
	char *next = bytes;
	for (size_t at = 0; at < count; at++, next += strlen(next) + 1)
		strings[at] = next;
	return strings;
}

static void say(int fd, const char *text)
{
	for (size_t left = strlen(text); left;) {
		ssize_t count = write(fd, text + strlen(text) - left, left);
		if (count > 0)
			left -= count;
		else if (errno == EAGAIN)
			doze_ms(1);
		else if (errno != EINTR)
			die("control port");
	}
}

/* One direction of one stream. A chunk waits here while its target has no room; so much is left to
 * be read, which has a limit only when the command has ended and something that it has left behind
 * may go on writing. */
struct way {
	int from, to;
	size_t at, end, left;
	char chunk[CHUNK];
};

static void end_way(struct way *way)
{
	if (way->from >= 0)
		close(way->from);
	if (way->to >= 0)
		close(way->to);
	way->from = way->to = -1;
	way->at = way->end = 0;
}

static bool is_later(void)
{
	return errno == EAGAIN || errno == EINTR;
}

/* Moves what can be moved without waiting; whether anything was. */
static bool move(struct way *way)
{
	if (way->from < 0)
		return false;
	if (way->at == way->end) {
		if (way->left == 0)
			return false;
		ssize_t count = read(way->from, way->chunk, way->left < CHUNK ? way->left : CHUNK);
		if (count < 0 && is_later())
			return false;
		if (count <= 0) {
			end_way(way);
			return false;
		}
		way->at = 0;
		way->end = count;
		way->left -= count;
	}
	ssize_t count = write(way->to, way->chunk + way->at, way->end - way->at);
	if (count < 0 && is_later())
		return false;
	if (count <= 0) {
		/* Nobody takes it any more: whoever writes shall learn it (SIGPIPE). */
		end_way(way);
		return false;
	}
	way->at += count;
	return true;
}

/* No more than what is in the pipe now. */
static void limit(struct way *way)
{
	int count = 0;
	if (way->from >= 0 && ioctl(way->from, FIONREAD, &count) == 0)
		way->left = count;
}

/* What to wait for so that the way can go on. A closed target is looked for too. */
static void ask(const struct way *way, struct pollfd asked[2])
{
	bool full = way->at < way->end;
	asked[0] = (struct pollfd){ .fd = full ? -1 : way->from, .events = POLLIN };
	asked[1] = (struct pollfd){ .fd = way->to, .events = full ? POLLOUT : 0 };
}

/* The program's place by PATH, as execvpe will find it, or NULL. */
static bool is_there(const char *program)
{
	const char *path = getenv("PATH");
	if (strchr(program, '/'))
		return access(program, F_OK) == 0;
	while (path && *path) {
		size_t length = strcspn(path, ":");
		char *candidate;
		if (asprintf(&candidate, "%.*s/%s", (int)length, path, program) < 0)
			return false;
		bool found = access(candidate, F_OK) == 0;
		free(candidate);
		if (found)
			return true;
		path += length + (path[length] == ':');
	}
	return false;
}

/* Whether a record of /job/promised is kept: "f SIZE PATH", a file of this size; "e 0 PATH", anything. */
static bool is_kept(const char *record)
{
	char kind, *path;
	unsigned long long size;
	int at = 0;
	struct stat stat;
	if (sscanf(record, "%c %llu %n", &kind, &size, &at) != 2 || at == 0)
		return false;
	path = (char *)record + at;
	if (lstat(path, &stat) < 0)
		return false;
	if (kind != 'f')
		return true;
	/* The kernel gives a file its size before it writes it: the blocks tell whether it has. A ramfs counts none. */
	unsigned long long written = stat.st_blocks * 512ULL;
	return S_ISREG(stat.st_mode) && (unsigned long long)stat.st_size == size && (written == 0 || written >= size);
}

/* Whether all that was promised is here. If not, says on the console what is missing, and on the control port
 * how much. */
static bool is_whole(int control)
{
	static const char *const ours[] = { "/job/argv", "/job/env", "/job/workdir", "/job/promised", "/job/end" };
	char told[128];
	size_t missing = 0, count = 0;
	for (size_t at = 0; at < sizeof ours / sizeof *ours; at++, count++) {
		if (access(ours[at], F_OK) < 0 && missing++ < 5)
			fprintf(stderr, PROGRAM ": %s is missing\n", ours[at]);
	}
	if (access("/job/promised", F_OK) == 0) {
		for (char **record = read_strings("/job/promised"); *record; record++, count++) {
			if (!is_kept(*record) && missing++ < 5)
				fprintf(stderr, PROGRAM ": missing or cut: %s\n", *record);
		}
	}
	if (missing == 0)
		return true;
	snprintf(told, sizeof told, "incomplete %zu %zu\n", missing, count);
	say(control, told);
	return false;
}

/* Blocks until minivmm has taken what was said last: then the guest may be switched off. */
static void wait_for_answer(int control)
{
	char answer[16];
	if (read(control, answer, sizeof answer) < 0)
		die("control port");
}

static void fail(int to, const char *step)
{
	dprintf(to, "failed %s %d\n", step, errno);
	_exit(127);
}

static void run(char **argv, int input, int output, int errors, int trouble)
{
	sigset_t none;
	size_t size;
	char **env = read_strings("/job/env");
	char *workdir = read_all("/job/workdir", &size);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	dup2(input, 0);
	dup2(output, 1);
	dup2(errors, 2);
	for (; *env; env++)
		putenv(*env);
	if (chdir(workdir) < 0)
		fail(trouble, "workdir");
	execvp(argv[0], argv);
	int error = errno;
	const char *step = is_there(argv[0]) ? "exec" : "find";
	errno = error;
	fail(trouble, step);
}

static void make_pipe(int ends[2], bool ours_reads)
{
	if (pipe2(ends, O_CLOEXEC) < 0)
		die("pipe");
	int ours = ends[ours_reads ? 0 : 1];
	fcntl(ours, F_SETFL, fcntl(ours, F_GETFL) | O_NONBLOCK);
}

static struct way in = { .from = -1, .to = -1, .left = SIZE_MAX };
static struct way out = { .from = -1, .to = -1, .left = SIZE_MAX };
static struct way err = { .from = -1, .to = -1, .left = SIZE_MAX };

/* Moves everything until the command has ended and what it had written has gone out. */
static int serve(pid_t child, int signals)
{
	int status = 0;
	bool ended = false;
	for (;;) {
		bool moved = move(&out) | move(&err);
		if (!ended)
			moved |= move(&in);
		struct pollfd asked[7] = { { .fd = signals, .events = POLLIN } };
		ask(&in, asked + 1);
		ask(&out, asked + 3);
		ask(&err, asked + 5);
		if (ended) {
			/* Its pipes are empty, and nothing waits here: that was all. */
			if (!moved && out.at == out.end && err.at == err.end)
				return status;
			asked[0].fd = asked[1].fd = asked[2].fd = -1;
		}
		if (poll(asked, 7, moved ? 0 : -1) < 0 && errno != EINTR)
			die("poll");
		if (!ended && asked[0].revents) {
			struct signalfd_siginfo info;
			if (read(signals, &info, sizeof info) < 0 && !is_later())
				die("signalfd");
			ended = waitpid(child, &status, WNOHANG) == child;
			if (ended) {
				limit(&out);
				limit(&err);
				continue;
			}
		}
		/* The command has closed its input, or minivmm's reader has gone away. */
		if (asked[2].revents & (POLLERR | POLLHUP))
			end_way(&in);
		if (asked[4].revents & (POLLERR | POLLHUP))
			end_way(&out);
		if (asked[6].revents & (POLLERR | POLLHUP))
			end_way(&err);
	}
}

int main(void)
{
	int pipes[4][2], control = open_port("org.minivmm.control", O_RDWR);
	char told[128] = "";
	sigset_t child_signal;

	say(control, "arrived\n");
	if (!is_whole(control)) {
		wait_for_answer(control);
		return 1;
	}
	in.from = open_port("org.minivmm.stdin", O_RDONLY | O_NONBLOCK);
	out.to = open_port("org.minivmm.stdout", O_WRONLY | O_NONBLOCK);
	err.to = open_port("org.minivmm.stderr", O_WRONLY | O_NONBLOCK);
	make_pipe(pipes[0], false);
	make_pipe(pipes[1], true);
	make_pipe(pipes[2], true);
	make_pipe(pipes[3], true);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&child_signal);
	sigaddset(&child_signal, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child_signal, NULL);
	int signals = signalfd(-1, &child_signal, SFD_CLOEXEC | SFD_NONBLOCK);

	char **argv = read_strings("/job/argv");
	say(control, "started\n");
	pid_t child = fork();
	if (child < 0 || signals < 0)
		die("fork");
	if (child == 0)
		run(argv, pipes[0][0], pipes[1][1], pipes[2][1], pipes[3][1]);
	close(pipes[0][0]);
	close(pipes[1][1]);
	close(pipes[2][1]);
	close(pipes[3][1]);
	in.to = pipes[0][1];
	out.from = pipes[1][0];
	err.from = pipes[2][0];

	int status = serve(child, signals);
	if (read(pipes[3][0], told, sizeof told - 1) <= 0) {
		if (WIFSIGNALED(status))
			snprintf(told, sizeof told, "killed %d\n", WTERMSIG(status));
		else
			snprintf(told, sizeof told, "exited %d\n", WEXITSTATUS(status));
	}
	say(control, told);
	wait_for_answer(control);
	return 0;
}
