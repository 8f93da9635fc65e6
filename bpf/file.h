/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * file.h - a file event from the first look to the record.
 */
#ifndef IMANS_FILE_H
#define IMANS_FILE_H

/* What a hook knows of its event; lives on its stack while the record is made. */
struct imans_look {
	__u64 mntns;
	__u64 policy;
	__u64 vma_start, vma_end;
	__u32 inum;
	__u32 func;
	__u32 flags;
	__u32 policy_flags; /* enum imans_namespace_policy_flag */
};

/* What is found out once a record is wanted. */
struct imans_found {
	struct imans_content content;
	struct imans_digest digest;
	__u32 flags;
	__u32 pad;
};

/* Two sizes, because a reservation's size must be a constant and few paths are long. */
struct imans_short_record {
	struct imans_file file;
	char path[IMANS_SHORT_PATH];
};

struct imans_long_record {
	struct imans_file file;
	char path[IMANS_PATH_MAX];
};

/*
 * Looks whether this content needs an event, as cheaply as can be. True: look is filled. A function of its own, as its stack is not to be there
 * when the record is made: all that call one another have 512 bytes.
 */
static __noinline bool imans_needs_event(struct file *file, __u32 func, __u32 flags, struct imans_look *look)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct inode *inode = file->f_inode;
	struct mnt_namespace *ns = task->nsproxy->mnt_ns;
	__u32 inum = ns->ns.inum;
	__u64 mntns;
	struct imans_namespace_policy *policy;

	if ((inode->i_mode & S_IFMT) != S_IFREG)
		return false;
	if (!inum) {
		imans_lose(0, 0, IMANS_LOSS_NO_MOUNT_NAMESPACE);
		return false;
	}
	mntns = imans_mntns_id(ns);
	policy = imans_mntns_policy(inum);
	if (policy && policy->mntns != mntns)
		policy = NULL; /* the agent has not looked at this namespace yet */
	if (policy && (imans_is_measured_in_slot(inode, func, flags, policy) || imans_is_measured(task, inode, func, flags, policy)))
		return false;
	look->mntns = mntns;
	look->inum = inum;
	look->func = func;
	look->flags = flags;
	look->policy = policy ? policy->generation : 0;
	look->policy_flags = policy ? policy->flags : 0;
	if (look->policy_flags & IMANS_IGNORE_IDS)
		look->flags |= IMANS_IDS_IGNORED;
	return true;
}

/*
 * Before 6.4 the verifier keeps apart all states in which some constant differs, and there are hundreds of ways to come here. Values that it
 * does not know bring them together, or it would give up.
 */
#define IMANS_FORGET(values) bpf_probe_read_kernel(&(values), sizeof(values), &(values))

static __always_inline void imans_find(struct file *file, struct imans_look *look, struct imans_found *found)
{
	IMANS_FORGET(*look);
	if (!(look->policy_flags & IMANS_KNOWN_IDS))
		imans_submit_id_maps(look->mntns, look->inum);
	found->flags = look->flags | imans_read_version(file->f_inode, &found->content.version);
	IMANS_FORGET(found->flags);
	imans_fill_content(file->f_inode, &found->content);
	found->digest.algo = -95; /* EOPNOTSUPP */
}

/* A copied name that fills its field may have been cut, and a cut name must not pass for the whole. */
static __always_inline void imans_fill_fs_name(struct imans_file *record, struct super_block *sb)
{
	if (bpf_probe_read_kernel_str(record->fs_name, sizeof(record->fs_name), sb->s_type->name) ==
	    sizeof(record->fs_name))
		record->flags |= IMANS_FS_NAME_CUT;
	if (sb->s_subtype && bpf_probe_read_kernel_str(record->fs_subtype, sizeof(record->fs_subtype), sb->s_subtype) ==
				     sizeof(record->fs_subtype))
		record->flags |= IMANS_FS_NAME_CUT;
}

static __always_inline void imans_fill_file(struct imans_file *record, struct file *file, const struct imans_look *look,
					    const struct imans_found *found)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct inode *inode = file->f_inode;
	struct super_block *sb = inode->i_sb;

	__builtin_memset(record, 0, sizeof(*record));
	imans_fill_header(&record->header, IMANS_FILE, look->mntns, look->inum);
	imans_fill_subject(&record->subject, task);
	__builtin_memcpy(&record->content, &found->content, sizeof(record->content));
	record->policy = look->policy;
	record->seen_ino = inode->i_ino;
	record->seen_magic = sb->s_magic;
	BPF_CORE_READ_INTO(&record->seen_uuid, sb, s_uuid);
	record->seen_dev = sb->s_dev;
	record->fowner = inode->i_uid.val;
	record->fgroup = inode->i_gid.val;
	record->func = look->func;
	record->flags = found->flags | imans_cap_flags(task->cred);
	if (!file->f_path.dentry->d_hash.pprev)
		record->flags |= IMANS_UNLINKED;
	record->vma_start = look->vma_start;
	record->vma_end = look->vma_end;
	__builtin_memcpy(&record->digest, &found->digest, sizeof(record->digest));
	imans_fill_fs_name(record, sb);
}

/* No path of at most PATH_MAX leads there (or the hook can't build one): the last component, as the kernel's IMA does. */
static __always_inline void imans_fill_name(struct imans_file *record, char *path, struct file *file)
{
	long len = bpf_probe_read_kernel_str(path, 256 /* NAME_MAX and its zero */,
					     BPF_CORE_READ(file, f_path.dentry, d_name.name));

	record->flags |= IMANS_NAME_ONLY;
	record->path_len = len > 0 ? len - 1 : 0;
}

/* bpf_d_path builds from the buffer's end and moves the result to its beginning; path_len says how much of it counts. */
static __noinline int imans_submit_file(struct file *file, struct imans_look *look)
{
	struct imans_short_record *record;
	struct imans_long_record *long_record;
	struct imans_found found = {};
	long len;

	imans_find(file, look, &found);
	found.flags |= imans_take_digest(file, &found.content, found.flags, &found.digest);
	IMANS_FORGET(found);
	record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	if (!record)
		return imans_lose(look->mntns, look->inum, IMANS_LOSS_RING_BUFFER_FULL);
	len = bpf_d_path(&file->f_path, record->path, sizeof(record->path));
	if (len > 0) {
		imans_fill_file(&record->file, file, look, &found);
		record->file.path_len = len - 1;
		imans_hold_file(file, &record->file);
		bpf_ringbuf_submit(record, imans_wake_flags());
		return 0;
	}
	bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);

	long_record = bpf_ringbuf_reserve(&events, sizeof(*long_record), 0);
	if (!long_record)
		return imans_lose(look->mntns, look->inum, IMANS_LOSS_RING_BUFFER_FULL);
	len = bpf_d_path(&file->f_path, long_record->path, sizeof(long_record->path));
	imans_fill_file(&long_record->file, file, look, &found);
	if (len > 0)
		long_record->file.path_len = len - 1;
	else
		imans_fill_name(&long_record->file, long_record->path, file);
	imans_hold_file(file, &long_record->file);
	bpf_ringbuf_submit(long_record, imans_wake_flags());
	return 0;
}

/* The same from a hook in which neither a digest nor bpf_d_path is allowed. */
static __noinline int imans_submit_mapping(struct file *file, struct imans_look *look)
{
	struct imans_short_record *record;
	struct imans_found found = {};

	imans_find(file, look, &found);
	record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	if (!record)
		return imans_lose(look->mntns, look->inum, IMANS_LOSS_RING_BUFFER_FULL);
	imans_fill_file(&record->file, file, look, &found);
	imans_fill_name(&record->file, record->path, file);
	imans_hold_file(file, &record->file);
	bpf_ringbuf_submit(record, imans_wake_flags());
	return 0;
}

#endif
