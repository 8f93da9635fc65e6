/* spawn COUNT PROGRAM: runs the program COUNT times, one after the other, and prints nanoseconds for each. */
#define _GNU_SOURCE
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

extern char **environ;

int main(int argc, char **argv)
{
	struct timespec from, to;
	int count, status;
	pid_t pid;

	if (argc != 3)
		return 2;
	count = atoi(argv[1]);
	clock_gettime(CLOCK_MONOTONIC, &from);
	for (int i = 0; i < count; i++) {
		if (posix_spawn(&pid, argv[2], NULL, NULL, argv + 2, environ) || waitpid(pid, &status, 0) < 0 || status)
			return 1;
	}
	clock_gettime(CLOCK_MONOTONIC, &to);
	printf("%.0f\n", ((to.tv_sec - from.tv_sec) * 1e9 + (to.tv_nsec - from.tv_nsec)) / count);
	return 0;
}
