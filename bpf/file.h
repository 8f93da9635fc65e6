/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * file.h - a file event from the first look to the record.
 */
#ifndef IMANS_FILE_H
#define IMANS_FILE_H

/* One entry, enum imans_setting, written by the agent while the programs run. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} settings SEC(".maps");

/* What a hook knows of its event; lives on its stack while the record is made. */
struct imans_look {
	struct imans_measured_key key;
	__u64 vma_start, vma_end;
	__u32 inum;
	__u32 flags;
	__s32 digest_algo;
	__u32 pad;
	__u8 digest[IMANS_DIGEST_MAX];
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
 * Looks whether this content needs an event. True: look is filled. The real answer comes from one map look-up; all before
 * it is plain loads.
 */
static __always_inline bool imans_needs_event(struct file *file, __u32 func, __u32 flags, struct imans_look *look)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct inode *inode = file->f_inode;
	struct mnt_namespace *ns = task->nsproxy->mnt_ns;

	if ((inode->i_mode & S_IFMT) != S_IFREG)
		return false;
	look->inum = ns->ns.inum;
	look->flags = imans_build_key(task, ns, inode, func, flags, &look->key);
	if (!look->inum) {
		imans_lose(0, 0, IMANS_LOSS_NO_MOUNT_NAMESPACE);
		return false;
	}
	return (look->flags & IMANS_WRITERS) || !bpf_map_lookup_elem(&measured_contents, &look->key);
}

/*
 * Asks the kernel for the digest: of the file as it is now, before a byte of it runs. It sleeps, so only sleepable hooks may
 * call it, and never with a record reserved: a slow file would hold up everyone's records. The version read again afterwards
 * tells whether the content stood still.
 */
static __always_inline void imans_take_digest(struct file *file, struct imans_look *look)
{
	struct imans_measured_key after = {};
	__u32 zero = 0, flags, *setting = bpf_map_lookup_elem(&settings, &zero);

	look->digest_algo = -95; /* EOPNOTSUPP */
	if (!imans_kernel_digest || !setting)
		return;
	if ((look->flags & IMANS_OVERLAY) && (*setting & IMANS_DISTRUST_OVERLAY))
		return;
	look->digest_algo = bpf_ima_file_hash(file, look->digest, sizeof(look->digest));
	flags = imans_read_content(file->f_inode, &after);
	look->flags |= flags & IMANS_WRITERS;
	if (!imans_same_version(&look->key, &after))
		look->flags |= IMANS_CHANGED;
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

static __always_inline void imans_fill_file(struct imans_file *record, struct file *file, const struct imans_look *look)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task_btf();
	struct inode *inode = file->f_inode;
	struct super_block *sb = inode->i_sb;
	const struct cred *cred = task->cred;

	__builtin_memset(record, 0, sizeof(*record));
	imans_fill_header(&record->header, IMANS_FILE, look->key.mntns, look->inum);
	record->subject.tgid = task->tgid;
	record->subject.pid = task->pid;
	record->subject.start_boottime = task->group_leader->start_boottime;
	record->subject.uid = cred->uid.val;
	record->subject.euid = cred->euid.val;
	record->subject.suid = cred->suid.val;
	record->subject.gid = cred->gid.val;
	record->subject.egid = cred->egid.val;
	record->subject.sgid = cred->sgid.val;
	imans_fill_content(inode, &look->key, &record->content);
	record->policy = look->key.policy;
	record->seen_ino = inode->i_ino;
	record->seen_magic = sb->s_magic;
	BPF_CORE_READ_INTO(&record->seen_uuid, sb, s_uuid);
	record->seen_dev = look->key.seen_dev;
	record->fowner = inode->i_uid.val;
	record->fgroup = inode->i_gid.val;
	record->func = look->key.func & 0xff;
	record->flags = look->flags;
	if (imans_has_cap(cred, CAP_SETUID))
		record->flags |= IMANS_SETUID_CAP;
	if (imans_has_cap(cred, CAP_SETGID))
		record->flags |= IMANS_SETGID_CAP;
	if (!file->f_path.dentry->d_hash.pprev)
		record->flags |= IMANS_UNLINKED;
	record->vma_start = look->vma_start;
	record->vma_end = look->vma_end;
	record->digest_algo = look->digest_algo;
	__builtin_memcpy(record->digest, look->digest, sizeof(record->digest));
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
static __noinline int imans_submit_file(struct file *file, const struct imans_look *look)
{
	struct imans_short_record *record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	struct imans_long_record *long_record;
	long len;

	if (!record)
		return imans_lose(look->key.mntns, look->inum, IMANS_LOSS_RING_BUFFER_FULL);
	len = bpf_d_path(&file->f_path, record->path, sizeof(record->path));
	if (len > 0) {
		imans_fill_file(&record->file, file, look);
		record->file.path_len = len - 1;
		bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
		return 0;
	}
	bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);

	long_record = bpf_ringbuf_reserve(&events, sizeof(*long_record), 0);
	if (!long_record)
		return imans_lose(look->key.mntns, look->inum, IMANS_LOSS_RING_BUFFER_FULL);
	len = bpf_d_path(&file->f_path, long_record->path, sizeof(long_record->path));
	imans_fill_file(&long_record->file, file, look);
	if (len > 0)
		long_record->file.path_len = len - 1;
	else
		imans_fill_name(&long_record->file, long_record->path, file);
	bpf_ringbuf_submit(long_record, BPF_RB_NO_WAKEUP);
	return 0;
}

/* The same from a hook in which bpf_d_path is not allowed. */
static __noinline int imans_submit_mapping(struct file *file, const struct imans_look *look)
{
	struct imans_short_record *record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);

	if (!record)
		return imans_lose(look->key.mntns, look->inum, IMANS_LOSS_RING_BUFFER_FULL);
	imans_fill_file(&record->file, file, look);
	imans_fill_name(&record->file, record->path, file);
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return 0;
}

#endif
