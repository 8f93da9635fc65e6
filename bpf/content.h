/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * content.h - which content: the inode that really holds a file's bytes, and the version of those bytes.
 *
 * An overlayfs inode stands for one of an upper or lower layer; two overlays on one layer share the real inode, and it is
 * the real inode whose change counter and time move. The walk follows fs/overlayfs: ovl_inode embeds the inode seen here,
 * and names the upper dentry, else the lowest layer's. Plain inodes are read by direct dereference, which the verifier
 * turns into a fault-proof load; a real inode found by the walk is an untyped pointer, so its fields cost a probe read each.
 */
#ifndef IMANS_CONTENT_H
#define IMANS_CONTENT_H

#define IMANS_READ(typed, object, field) ((typed) ? (object)->field : BPF_CORE_READ(object, field))

/* The real inode behind an overlayfs inode, or NULL where this kernel's overlayfs looks like none that is known. */
static __always_inline struct inode *imans_overlay_real(struct inode *inode)
{
	struct dentry *dentry = NULL;

	if (bpf_core_field_exists(struct ovl_inode, oe)) {
		struct ovl_inode *overlay = (void *)inode - bpf_core_field_offset(struct ovl_inode, vfs_inode);

		dentry = BPF_CORE_READ(overlay, __upperdentry);
		if (!dentry) {
			struct ovl_entry *entry = BPF_CORE_READ(overlay, oe);
			struct ovl_path *lower = (void *)entry + bpf_core_field_offset(struct ovl_entry, __lowerstack);

			dentry = BPF_CORE_READ(lower, dentry);
		}
	} else if (bpf_core_field_exists(struct ovl_inode___6_1, lowerpath)) {
		struct ovl_inode___6_1 *overlay = (void *)inode - bpf_core_field_offset(struct ovl_inode___6_1, vfs_inode);

		dentry = BPF_CORE_READ(overlay, __upperdentry);
		if (!dentry)
			dentry = BPF_CORE_READ(overlay, lowerpath.dentry);
	}
	return dentry ? BPF_CORE_READ(dentry, d_inode) : NULL;
}

static __always_inline void imans_read_ctime(struct inode *inode, bool typed, struct imans_measured_key *key)
{
	if (bpf_core_field_exists(struct inode___6_11, i_ctime_sec)) {
		struct inode___6_11 *i = (void *)inode;

		key->ctime_sec = IMANS_READ(typed, i, i_ctime_sec);
		key->ctime_nsec = IMANS_READ(typed, i, i_ctime_nsec) & ~I_CTIME_QUERIED;
	} else if (bpf_core_field_exists(struct inode___6_6, __i_ctime)) {
		struct inode___6_6 *i = (void *)inode;

		key->ctime_sec = IMANS_READ(typed, i, __i_ctime.tv_sec);
		key->ctime_nsec = IMANS_READ(typed, i, __i_ctime.tv_nsec);
	} else {
		struct inode___6_1 *i = (void *)inode;

		key->ctime_sec = IMANS_READ(typed, i, i_ctime.tv_sec);
		key->ctime_nsec = IMANS_READ(typed, i, i_ctime.tv_nsec);
	}
}

/* Fills the content part of a key and returns the flags that go with it. */
static __always_inline __u32 imans_read_version(struct inode *inode, bool typed, struct imans_measured_key *key)
{
	struct super_block *sb = IMANS_READ(typed, inode, i_sb);
	__u32 flags = 0;

	key->ino = IMANS_READ(typed, inode, i_ino);
	key->dev = IMANS_READ(typed, sb, s_dev);
	key->generation = IMANS_READ(typed, inode, i_generation);
	key->size = IMANS_READ(typed, inode, i_size);
	key->change = 0;
	if (IMANS_READ(typed, sb, s_flags) & SB_I_VERSION) {
		/* Bit 0 says that someone queried the counter; it is no part of the version (include/linux/iversion.h). */
		key->change = (__u64)IMANS_READ(typed, inode, i_version.counter) >> 1;
		flags |= IMANS_VERSIONED;
	}
	imans_read_ctime(inode, typed, key);
	if (IMANS_READ(typed, inode, i_writecount.counter) > 0)
		flags |= IMANS_WRITERS;
	return flags;
}

/* Reads identity and version of a file's content into the key. */
static __always_inline __u32 imans_read_content(struct inode *inode, struct imans_measured_key *key)
{
	struct inode *real;

	key->seen_dev = inode->i_sb->s_dev;
	if (inode->i_sb->s_magic != OVERLAYFS_SUPER_MAGIC)
		return imans_read_version(inode, true, key);
	real = imans_overlay_real(inode);
	if (!real)
		return imans_read_version(inode, true, key) | IMANS_OVERLAY | IMANS_REAL_UNKNOWN;
	return imans_read_version(real, false, key) | IMANS_OVERLAY;
}

static __always_inline bool imans_same_version(const struct imans_measured_key *a, const struct imans_measured_key *b)
{
	return a->ino == b->ino && a->dev == b->dev && a->generation == b->generation && a->change == b->change &&
	       a->size == b->size && a->ctime_sec == b->ctime_sec && a->ctime_nsec == b->ctime_nsec;
}

/* The parts of a content that only a record needs. */
static __always_inline void imans_fill_content(struct inode *inode, const struct imans_measured_key *key,
					       struct imans_content *content)
{
	struct inode *real = NULL;

	content->ino = key->ino;
	content->change = key->change;
	content->size = key->size;
	content->ctime_sec = key->ctime_sec;
	content->ctime_nsec = key->ctime_nsec;
	content->dev = key->dev;
	content->generation = key->generation;
	if (inode->i_sb->s_magic == OVERLAYFS_SUPER_MAGIC)
		real = imans_overlay_real(inode);
	if (!real)
		real = inode;
	content->nlink = BPF_CORE_READ(real, i_nlink);
	content->fs_magic = BPF_CORE_READ(real, i_sb, s_magic);
	BPF_CORE_READ_INTO(&content->fs_uuid, real, i_sb, s_uuid);
}

#endif
