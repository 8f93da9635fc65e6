/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * writers.h - who opens for writing what was measured and is in use (time of measure, time of use).
 *
 * An inode is held from the moment on when its content is sent to be measured. Opening it for writing while someone has it open
 * for reading is a record, once for each content that was sent. So is opening young content within a tick of the clock, in use or not: what is
 * written then can leave the change time as it was, which the agent would not see where it is the one that hashes. No hook of the LSM is called
 * for writers alone, and one for all opens would cost each file that an exec opens some 200 instructions. So the place is where a mount is asked for write access,
 * which do_dentry_open does before security_file_open; the file is what the task's path walk has come to.
 */
#ifndef IMANS_WRITERS_H
#define IMANS_WRITERS_H

/* Full: IMANS_HOLD_ALL, and every inode counts as held. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct imans_inode);
	__type(value, struct imans_hold);
} held_inodes SEC(".maps");

/*
 * How many jiffies may pass while the clock that change times are taken from stands still: it follows a jiffy later at times (kernel/time,
 * timekeeping_advance). No helper for that clock itself may be called here.
 */
#define IMANS_TICK 2

/* The jiffies when young content was sent last for whose inode there was no room. */
static __u64 imans_no_room;

static __noinline int imans_hold_inode(__u64 ino, __u32 dev, __u32 generation, __u64 jiffies)
{
	struct imans_inode key = { .ino = ino, .dev = dev, .generation = generation };
	struct imans_hold hold = { .boottime = bpf_ktime_get_boot_ns(), .jiffies = jiffies };
	__u32 *all;
	int err = bpf_map_update_elem(&held_inodes, &key, &hold, BPF_ANY);

	if (err) {
		all = imans_setting(IMANS_HOLD_ALL);
		if (all)
			*all = 1;
		imans_no_room = jiffies;
	}
	return 0;
}

/*
 * Holds a file whose record is reserved: a writer's record comes after it. Whoever came before, since the content was looked at, is
 * seen by the version or as a writer; the flags for that are returned.
 */
static __noinline int imans_hold_file(struct file *file, const struct imans_version *version)
{
	struct inode *inode = file->f_inode;
	struct imans_version now = {};
	__u64 jiffies = 0;
	int flags;

	if (!imans_is_settled(version))
		jiffies = bpf_jiffies64();
	imans_hold_inode(version->ino, version->dev, version->generation, jiffies);
	if (inode->i_sb->s_magic == OVERLAYFS_SUPER_MAGIC)
		imans_hold_inode(inode->i_ino, inode->i_sb->s_dev, 0, jiffies);
	flags = imans_read_version(inode, &now) & IMANS_WRITERS;
	if (!imans_same_version(version, &now))
		flags |= IMANS_CHANGED;
	return flags;
}

/*
 * Whether someone has the file open, or mapped, for reading only. An overlayfs file's mappings are of the real file; those of a lower layer
 * keep what they have, as the writer gets a copy. Once overlayfs opens the real file for the writer, write access is asked for a second time;
 * that is known by the real file's writer, and one that was there before has been told of.
 */
static __always_inline bool imans_has_readers(struct inode *inode)
{
	struct dentry *upper;
	struct inode *real;

	if (inode->i_readcount.counter > 0)
		return true;
	if (inode->i_sb->s_magic != OVERLAYFS_SUPER_MAGIC || !bpf_core_type_exists(struct ovl_inode))
		return false;
	upper = imans_overlay_upper(inode);
	if (!upper)
		return false;
	real = BPF_CORE_READ(upper, d_inode);
	return BPF_CORE_READ(real, i_readcount.counter) > 0 && BPF_CORE_READ(real, i_writecount.counter) <= 0;
}

/* Whether a writer of the inode is to be told of now. Where nobody uses it, young content was sent within a tick. */
static __always_inline bool imans_is_held(const struct imans_inode *key, bool in_use)
{
	struct imans_hold *hold = bpf_map_lookup_elem(&held_inodes, key);
	__u32 *all;

	if (hold && !in_use)
		return bpf_jiffies64() - hold->jiffies <= IMANS_TICK;
	if (hold)
		return !__sync_lock_test_and_set(&hold->told, 1);
	all = imans_setting(IMANS_HOLD_ALL);
	return all && *all && (in_use || bpf_jiffies64() - imans_no_room <= IMANS_TICK);
}

/*
 * There was no room to tell of a writer. Any list may hold the inode, so the loss is of no namespace's: all lists that hold something say it.
 * The next writer is told of.
 */
static __noinline int imans_lose_writer(const struct imans_inode *key)
{
	struct imans_hold *hold = bpf_map_lookup_elem(&held_inodes, key);

	if (hold)
		hold->told = 0;
	return imans_lose(0, 0, IMANS_LOSS_WRITER_LOST);
}

static __always_inline void imans_tell_writer(struct inode *inode)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct super_block *sb = inode->i_sb;
	struct imans_inode key = { .ino = inode->i_ino, .dev = sb->s_dev };
	bool in_use = imans_has_readers(inode);
	struct mnt_namespace *ns;
	struct imans_write *record;
	__u64 mntns;

	if (sb->s_magic != OVERLAYFS_SUPER_MAGIC)
		key.generation = inode->i_generation;
	if (!imans_is_held(&key, in_use))
		return;
	ns = task->nsproxy->mnt_ns;
	mntns = imans_mntns_id(ns);
	record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	if (!record) {
		imans_lose_writer(&key);
		return;
	}
	imans_fill_header(&record->header, IMANS_WRITE, mntns, ns->ns.inum);
	imans_fill_subject(&record->subject, task);
	record->inode = key;
	bpf_ringbuf_submit(record, imans_wake_flags());
}

/* What is asked for without a path walk is no open of a program's. */
static __noinline int imans_look_at_writer(struct vfsmount *mnt)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct nameidata *walk = task->nameidata;
	struct inode *inode;

	if (!walk || walk->path.mnt != mnt)
		return 0;
	inode = walk->path.dentry->d_inode;
	if ((inode->i_mode & S_IFMT) == S_IFREG)
		imans_tell_writer(inode);
	return 0;
}

#endif
