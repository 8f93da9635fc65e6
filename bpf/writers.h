/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * writers.h - who opens for writing what was measured and is in use (time of measure, time of use).
 *
 * An inode is held from the moment on when its content is sent to be measured. Opening it for writing while someone has it open
 * for reading is a record, once for each content that was sent. Each such open is counted, in use or not: where the agent is the one that hashes, and
 * the change time does not show each change, that tells whether what it hashed is what was used. No hook of the LSM is called for writers alone, and
 * one for all opens would cost each file that an exec opens some 200 instructions. So the place is where a mount is asked for write access, which
 * do_dentry_open does before security_file_open; the file is what the task's path walk has come to.
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

/* Returns how often the inode was opened for writing since it is held. */
static __noinline __u32 imans_hold_inode(__u64 ino, __u32 dev, __u32 generation)
{
	struct imans_inode key = { .ino = ino, .dev = dev, .generation = generation };
	struct imans_hold first = {}, *hold = bpf_map_lookup_elem(&held_inodes, &key);
	__u32 *all;

	if (!hold) {
		bpf_map_update_elem(&held_inodes, &key, &first, BPF_NOEXIST);
		hold = bpf_map_lookup_elem(&held_inodes, &key);
	}
	if (!hold) {
		all = imans_setting(IMANS_HOLD_ALL);
		if (all)
			*all = 1;
		return 0;
	}
	hold->boottime = bpf_ktime_get_boot_ns();
	hold->told = 0;
	return *(volatile __u32 *)&hold->writes;
}

/*
 * Holds a file whose record is made, so that a writer's record comes after it. Whoever came before, since the content was looked at, is seen by the
 * version or as a writer; who comes later is counted.
 */
static __noinline int imans_hold_file(struct file *file, struct imans_file *record)
{
	struct inode *inode = file->f_inode;
	struct imans_version now = {};

	record->content.writes = imans_hold_inode(record->content.version.ino, record->content.version.dev, record->content.version.generation);
	if (inode->i_sb->s_magic == OVERLAYFS_SUPER_MAGIC)
		record->content.writes += imans_hold_inode(inode->i_ino, inode->i_sb->s_dev, 0);
	record->flags |= imans_read_version(inode, &now) & IMANS_WRITERS;
	if (!imans_same_version(&record->content.version, &now))
		record->flags |= IMANS_CHANGED;
	return 0;
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

/* Counts that an inode is being opened for writing. Returns whether that is to be told of. */
static __always_inline bool imans_count_writer(const struct imans_inode *key, bool in_use)
{
	struct imans_hold *hold = bpf_map_lookup_elem(&held_inodes, key);
	__u32 *all;

	if (hold) {
		__sync_fetch_and_add(&hold->writes, 1);
		return in_use && !__sync_lock_test_and_set(&hold->told, 1);
	}
	all = imans_setting(IMANS_HOLD_ALL);
	return in_use && all && *all;
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

/*
 * Counts the writer of an overlayfs inode at the inode that has its bytes, in the upper layer: a mapping that is made executable later is of that
 * one (imans_file_mprotect). upper: which it is.
 */
static __noinline bool imans_count_writer_of_upper(struct inode *inode, struct imans_inode *upper, bool in_use)
{
	struct dentry *dentry = bpf_core_type_exists(struct ovl_inode) ? imans_overlay_upper(inode) : NULL;
	struct inode *real;

	if (!dentry)
		return false;
	real = BPF_CORE_READ(dentry, d_inode);
	upper->ino = BPF_CORE_READ(real, i_ino);
	upper->dev = BPF_CORE_READ(real, i_sb, s_dev);
	upper->generation = BPF_CORE_READ(real, i_generation);
	return imans_count_writer(upper, in_use);
}

static __always_inline void imans_tell_writer(struct inode *inode)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct super_block *sb = inode->i_sb;
	struct imans_inode key = { .ino = inode->i_ino, .dev = sb->s_dev }, upper = {};
	bool tell, overlay = sb->s_magic == OVERLAYFS_SUPER_MAGIC, in_use = imans_has_readers(inode);
	struct mnt_namespace *ns;
	struct imans_write *record;
	__u64 mntns;

	if (!overlay)
		key.generation = inode->i_generation;
	tell = imans_count_writer(&key, in_use);
	if (overlay && imans_count_writer_of_upper(inode, &upper, in_use)) {
		tell = true;
		key = upper; /* which is no other file's: an overlay's own numbers are soon given again */
	}
	if (!tell)
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
