/*
 * spawn COUNT PROGRAM: runs the program COUNT times, one after the other, and prints the lower quartile of their nanoseconds. What the
 * kernel does every now and then (ticks, RCU, pages cleared for a cache) comes on top of single ones, and differs by more than
 * what is to be measured.
 */
#define _GNU_SOURCE
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

extern char **environ;

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
	long long x = *(const long long *)a, y = *(const long long *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	int count = argc == 3 ? atoi(argv[1]) : 0, status;
	long long *took;
	pid_t pid;

	if (count < 1 || !(took = malloc(count * sizeof(*took))))
		return 2;
	for (int i = 0; i < count; i++)
		took[i] = -1; /* no page of it is new later on */
	for (int i = 0; i < count; i++) {
		long long start = now();

		if (posix_spawn(&pid, argv[2], NULL, NULL, argv + 2, environ) || waitpid(pid, &status, 0) < 0 || status)
			return 1;
		took[i] = now() - start;
	}
	qsort(took, count, sizeof(*took), ascending);
	printf("%lld\n", took[count / 4]);
	return 0;
}
