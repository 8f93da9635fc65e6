/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * standin.h - what the kernel skips is made up for.
 *
 * The kernel skips a tracing program where another task was interrupted in the same one on that processor. So two stand at each function,
 * one after the other, which would do the same: the first leaves its task's word here, and where it did not, the second does the work. A run
 * of a first that was skipped and that no second stood in for is something that nobody saw.
 */
#ifndef IMANS_STANDIN_H
#define IMANS_STANDIN_H

enum imans_function {
	IMANS_WRITE_ACCESS = 0,
	IMANS_COPY_MNT_NS = 1,
	IMANS_SWITCH_TASK_NAMESPACES = 2,
	IMANS_PROC_FREE_INUM = 3,
	IMANS_FUNCTIONS = 4,
};

_Static_assert(IMANS_SETTINGS == IMANS_STAND_INS + IMANS_FUNCTIONS, "a word of settings for each function");

#define IMANS_RUNS 4096

static __u32 imans_runs[IMANS_RUNS];

/* The word of the current task at a function: 24 bits, as a pid has 22. */
static __always_inline __u32 imans_run_word(enum imans_function function)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();

	return task->pid * IMANS_FUNCTIONS + function;
}

static __always_inline void imans_count_stand_in(enum imans_function function, __u32 by)
{
	__u32 *count = imans_setting(IMANS_STAND_INS + function);

	if (count)
		__sync_fetch_and_add(count, by);
}

/* The first has run. Another's word stays: then the second runs as well, which makes up for the one taken off here. */
static __always_inline void imans_leave_run(enum imans_function function)
{
	__u32 word = imans_run_word(function);
	__u32 before = __sync_val_compare_and_swap(&imans_runs[word % IMANS_RUNS], 0, word);

	if (before && before != word)
		imans_count_stand_in(function, -1);
}

/* Whether the first ran, so that the second has nothing to do. */
static __always_inline bool imans_take_run(enum imans_function function)
{
	__u32 word = imans_run_word(function);

	if (__sync_val_compare_and_swap(&imans_runs[word % IMANS_RUNS], word, 0) == word)
		return true;
	imans_count_stand_in(function, 1);
	return false;
}

#endif
