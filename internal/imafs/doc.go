// Package imafs is the window that each mount namespace has on its own IMA: one FUSE mount that looks like securityfs, in which
// every caller finds the lists, the policy and the settings of the mount namespace that it calls from.
//
// Mount, then Run until its context ends. What is shown comes from a Views, which the agent implements; this package knows the
// files, who may do what, and how the kernel's files behave. It keeps nothing of a namespace but its open files.
//
// # The folders
//
//	ima -> integrity/ima            as in securityfs
//	integrity/ima -> ../.ns/INUM    INUM is the caller's mount namespace's inode number
//	.ns/INUM/                       seen by that namespace only, and not listed
//
// So each namespace has FUSE inodes of its own, with owners, modes and locks of its own, and no name stands for two inodes at
// once: with one name for all, a look-up from one namespace would throw the others' out of the kernel's cache, with what is
// mounted there. No look-up is cached. Every open decides by the caller at that moment, whatever inode it came by: a file reached
// through a folder or a descriptor from another namespace shows the caller's own namespace. What is open already stays with the
// namespace it was opened in, as a file of the kernel does.
//
// # The files
//
//	active                              0644  0 or 1; 1 can be written once
//	hash, template_name                 0644  can be written until then
//	newns                               0600  1: the next clone of a mount namespace by the caller's process tree becomes an IMA
//	                                          namespace; that clone or writing 0 makes it 0 again
//	policy                              0600
//	{ascii,binary}_runtime_measurements{,_sha1,_sha256,_sha384,_sha512}  0440
//	runtime_measurements_count, violations                               0440
//
// The owner is root of the namespace's user namespace. The size of a file is what there is to read, so that tail -f sees a list grow
// (a look-up of one is a barrier too, and opening files with O_CREAT in the folder waits for it), and sendfile(2), by which some tools copy, works; securityfs says 0. There are no inotify events, which securityfs has not either, and poll says
// always ready.
//
// # Errors
//
// They are those of the kernel's files (security/integrity/ima/ima_fs.c) and of the proposed patches for IMA namespaces:
//
//	EACCES  before activation, all but active, hash, template_name and newns (and writing policy where that activates); a mode that forbids it; to open policy for reading
//	        and writing; to write without CAP_SYS_ADMIN (or CAP_MAC_ADMIN) in the user namespace that owns the mount namespace,
//	        and without being its root or having CAP_DAC_OVERRIDE there; to make files
//	EPERM   to read policy without that capability; to change owners and modes, to remove or rename
//	EBUSY   someone has policy open for writing; to write active, hash or template_name when active; another file is being loaded
//	EINVAL  what is not a rule, an algorithm, a template, or 1 (0 too to newns); a write elsewhere than where the last one ended
//	EAGAIN  what the kernel recorded could not be brought into the lists within two seconds
//	EMFILE  a namespace has 1024 files open
//	ENODEV  the namespace has ended
//	EINTR   the caller was killed while it waited, which nobody sees; other signals do not interrupt, as no file should
//	EIO     anything else; the agent's log says more
//
// # Reading
//
// The lists and counters are read through a barrier: what was recorded before the open is there. A list is what it was at open,
// up to its end; whoever reads on there, as tail -f does, has another barrier and gets what has come since. Nothing of a list is
// kept in memory but the entry that a read ended in; a read at any other offset looks for its place from a known one on.
//
// # Writing the policy
//
// One writer at a time. Each write takes one line, at most a page less one byte: the writer comes back with the rest, as libc and
// all tools do. A zero byte ends a line too. A line that begins with "/" names a file of rules, which is opened in the caller's
// root with the caller's file system ids. A bad rule makes its write fail, and with it all that is written until the close. At
// the last close the rules take effect, before close(2) returns. Whether a close is the last is looked up among the open files of
// the processes in the writer's mount namespace; if one elsewhere has the file too, or it is on its way through a socket, the
// rules written so far take effect at the first close. What the View says of them then, such as that there are too many, is the
// error of close(2); the kernel has none there.
//
// Two more differences from the kernel: the last line of a file that is loaded needs no newline, and a write that ends without
// one returns no more than was written.
package imafs
