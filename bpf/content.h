/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * content.h - which content: the inode that really holds a file's bytes, and the version of those bytes.
 *
 * An overlayfs inode stands for one of an upper or lower layer; two overlays on one layer share the real inode, and it is
 * the real inode whose change counter and time move. The walk follows fs/overlayfs: ovl_inode embeds the inode seen here,
 * and names the upper dentry and those of lower layers. With metacopy all but one of them hold owner and mode alone. Plain inodes are read by direct dereference, which the verifier
 * turns into a fault-proof load. A real inode found by the walk is an untyped pointer: bpf_rdonly_cast gives it its type
 * (kernel commit a35b9af4ec2c, 6.2); before, its fields cost a probe read each.
 */
#ifndef IMANS_CONTENT_H
#define IMANS_CONTENT_H

#define IMANS_READ(typed, object, field) ((typed) ? (object)->field : BPF_CORE_READ(object, field))

extern void *bpf_rdonly_cast(const void *object, __u32 type) __ksym __weak;

/* The upper layer's dentry of an overlayfs inode, or NULL: nobody has written to the file yet. */
static __always_inline struct dentry *imans_overlay_upper(struct inode *inode)
{
	struct ovl_inode *overlay = (void *)inode - bpf_core_field_offset(struct ovl_inode, vfs_inode);

	return BPF_CORE_READ(overlay, __upperdentry);
}

/* The inode with an overlayfs inode's data, whose upper layer's dentry is upper, or NULL. Source: ovl_inode_realdata of fs/overlayfs/util.c. */
static __always_inline struct inode *imans_overlay_data(struct ovl_inode *overlay, struct dentry *upper)
{
	struct dentry *dentry = upper;
	struct ovl_entry *entry;
	unsigned int layers = 0;
	struct ovl_path *data;

	if (!upper || !(BPF_CORE_READ(overlay, flags) & 1ul << bpf_core_enum_value(enum ovl_inode_flag, OVL_UPPERDATA))) {
		entry = BPF_CORE_READ(overlay, oe);
		if (entry)
			layers = BPF_CORE_READ(entry, __numlower);
		if (layers) {
			data = (void *)entry + bpf_core_field_offset(struct ovl_entry, __lowerstack) +
			       (layers - 1) * bpf_core_type_size(struct ovl_path);
			dentry = BPF_CORE_READ(data, dentry);
		}
	}
	return dentry ? BPF_CORE_READ(dentry, d_inode) : NULL;
}

/* The same before 6.5. Where lowerdata is none, the data is in the same lower inode as the rest. */
static __always_inline struct inode *imans_overlay_data_6_1(struct ovl_inode___6_1 *overlay, struct dentry *upper)
{
	struct dentry *dentry = upper, *lower;
	struct inode *data;

	if (!upper || !(BPF_CORE_READ(overlay, flags) & 1ul << bpf_core_enum_value(enum ovl_inode_flag, OVL_UPPERDATA))) {
		data = BPF_CORE_READ(overlay, lowerdata);
		if (data)
			return data;
		lower = BPF_CORE_READ(overlay, lowerpath.dentry);
		if (lower)
			dentry = lower;
	}
	return dentry ? BPF_CORE_READ(dentry, d_inode) : NULL;
}

/* The inode that has an overlayfs file's data, or NULL where this kernel's overlayfs looks like none that is known, or has not looked for it yet. */
static __noinline struct inode *imans_overlay_real(struct inode *inode)
{
	if (bpf_core_field_exists(struct ovl_inode, oe))
		return imans_overlay_data((void *)inode - bpf_core_field_offset(struct ovl_inode, vfs_inode), imans_overlay_upper(inode));
	if (bpf_core_field_exists(struct ovl_inode___6_1, lowerpath))
		return imans_overlay_data_6_1((void *)inode - bpf_core_field_offset(struct ovl_inode___6_1, vfs_inode),
					      imans_overlay_upper(inode));
	return NULL;
}

/*
 * Which subvolume of btrfs an inode is of. In a snapshot of it another inode may have the same number, generation, count of changes, change
 * time and size on the same device, and not the same bytes. The number of the last subvolume is given again by the next mount if that one was
 * deleted; the transaction that made a snapshot is not. 0: this kernel's btrfs was not there when the programs were loaded, or is not known.
 */
static __noinline __u64 imans_btrfs_subvolume(struct inode *inode)
{
	struct btrfs_inode *of;
	struct btrfs_root *root;
	__u64 number, since;

	if (!bpf_core_field_exists(struct btrfs_inode, root) || !bpf_core_field_exists(struct btrfs_root, root_key))
		return 0;
	of = (void *)inode - bpf_core_field_offset(struct btrfs_inode, vfs_inode);
	root = BPF_CORE_READ(of, root);
	number = BPF_CORE_READ(root, root_key.objectid);
	since = BPF_CORE_READ(root, root_key.offset);
	if ((number | since) >> 32)
		return 0;
	return number << 32 | since;
}

static __always_inline __u64 imans_subvolume(struct inode *inode, bool typed)
{
	struct super_block *sb = IMANS_READ(typed, inode, i_sb);

	return IMANS_READ(typed, sb, s_magic) == BTRFS_SUPER_MAGIC ? imans_btrfs_subvolume(inode) : 0;
}

static __always_inline __u64 imans_read_ctime(struct inode *inode, bool typed)
{
	__s64 sec;
	__u32 nsec;

	if (bpf_core_field_exists(struct inode___6_11, i_ctime_sec)) {
		struct inode___6_11 *i = (void *)inode;

		sec = IMANS_READ(typed, i, i_ctime_sec);
		nsec = IMANS_READ(typed, i, i_ctime_nsec) & ~I_CTIME_QUERIED;
	} else if (bpf_core_field_exists(struct inode___6_6, __i_ctime)) {
		struct inode___6_6 *i = (void *)inode;

		sec = IMANS_READ(typed, i, __i_ctime.tv_sec);
		nsec = IMANS_READ(typed, i, __i_ctime.tv_nsec);
	} else {
		struct inode___6_1 *i = (void *)inode;

		sec = IMANS_READ(typed, i, i_ctime.tv_sec);
		nsec = IMANS_READ(typed, i, i_ctime.tv_nsec);
	}
	return (__u64)sec << 30 | nsec;
}

/*
 * What moves when the content does, but for the change time: the change counter where the file system keeps one, else the size. Bit 0
 * of the counter says that someone queried it; it is no part of the version (include/linux/iversion.h).
 */
static __always_inline __u64 imans_read_change(struct inode *inode, bool typed, bool *versioned)
{
	struct super_block *sb = IMANS_READ(typed, inode, i_sb);

	*versioned = IMANS_READ(typed, sb, s_flags) & SB_I_VERSION;
	if (*versioned)
		return (__u64)IMANS_READ(typed, inode, i_version.counter) >> 1;
	return IMANS_READ(typed, inode, i_size);
}

/*
 * Whether nobody can write to a file in memory: this seal is refused while there is a mapping that may be written to, and none can be made once
 * it is there. F_SEAL_FUTURE_WRITE leaves those that there are.
 */
static __noinline bool imans_is_sealed(struct inode *inode, __u64 magic)
{
	struct shmem_inode_info *small;
	struct hugetlbfs_inode_info *huge;
	unsigned int seals = 0;

	if (magic == TMPFS_MAGIC && bpf_core_field_exists(struct shmem_inode_info, seals)) {
		small = (void *)inode - bpf_core_field_offset(struct shmem_inode_info, vfs_inode);
		seals = BPF_CORE_READ(small, seals);
	} else if (magic == HUGETLBFS_MAGIC && bpf_core_field_exists(struct hugetlbfs_inode_info, seals)) {
		huge = (void *)inode - bpf_core_field_offset(struct hugetlbfs_inode_info, vfs_inode);
		seals = BPF_CORE_READ(huge, seals);
	}
	return seals & F_SEAL_WRITE;
}

/*
 * Whether someone may write to an inode by what is open. A file on a mount of the kernel's own, as memfd_create and shmget make them, comes with
 * a descriptor or a mapping that i_writecount does not know of (fs/file_table.c, alloc_file_pseudo).
 */
static __always_inline bool imans_has_writers(struct inode *inode, bool typed, struct super_block *sb, __u64 magic)
{
	return IMANS_READ(typed, inode, i_writecount.counter) > 0 ||
	       (IMANS_READ(typed, sb, s_flags) & SB_KERNMOUNT && !imans_is_sealed(inode, magic));
}

/* Returns the flags that go with the version. */
static __always_inline __u32 imans_read_real_version(struct inode *inode, bool typed, struct imans_version *version)
{
	struct super_block *sb = IMANS_READ(typed, inode, i_sb);
	__u64 magic = IMANS_READ(typed, sb, s_magic);
	__u32 flags;
	bool versioned;

	version->ino = IMANS_READ(typed, inode, i_ino);
	version->change = imans_read_change(inode, typed, &versioned);
	flags = versioned ? IMANS_VERSIONED : 0;
	version->ctime = imans_read_ctime(inode, typed);
	version->dev = IMANS_READ(typed, sb, s_dev);
	version->generation = IMANS_READ(typed, inode, i_generation);
	version->subvolume = imans_subvolume(inode, typed);
	if (magic == BTRFS_SUPER_MAGIC && !version->subvolume)
		flags |= IMANS_REAL_UNKNOWN;
	if (imans_has_writers(inode, typed, sb, magic))
		flags |= IMANS_WRITERS;
	return flags;
}

/* Reads which content a file has now, and returns the flags that go with it. */
static __always_inline __u32 imans_read_version(struct inode *inode, struct imans_version *version)
{
	struct inode *real;

	if (inode->i_sb->s_magic != OVERLAYFS_SUPER_MAGIC)
		return imans_read_real_version(inode, true, version);
	real = imans_overlay_real(inode);
	if (!real)
		return imans_read_real_version(inode, true, version) | IMANS_OVERLAY | IMANS_REAL_UNKNOWN;
	if (bpf_rdonly_cast) {
		real = bpf_rdonly_cast(real, bpf_core_type_id_kernel(struct inode));
		return imans_read_real_version(real, true, version) | IMANS_OVERLAY;
	}
	return imans_read_real_version(real, false, version) | IMANS_OVERLAY;
}

static __always_inline bool imans_same_version(const struct imans_version *a, const struct imans_version *b)
{
	return a->ino == b->ino && a->change == b->change && a->ctime == b->ctime && a->subvolume == b->subvolume &&
	       a->dev == b->dev && a->generation == b->generation;
}

/* Adds to the version, which is there already, what only a record needs. */
static __always_inline void imans_fill_content(struct inode *inode, struct imans_content *content)
{
	struct inode *real = NULL;

	if (inode->i_sb->s_magic == OVERLAYFS_SUPER_MAGIC)
		real = imans_overlay_real(inode);
	if (!real)
		real = inode;
	content->size = BPF_CORE_READ(real, i_size);
	content->nlink = BPF_CORE_READ(real, i_nlink);
	content->fs_magic = BPF_CORE_READ(real, i_sb, s_magic);
	BPF_CORE_READ_INTO(&content->fs_uuid, real, i_sb, s_uuid);
}

#endif
