// Package window holds shell scripts that check an IMA namespace from within, as its user sees it: they know no more than a
// path to a folder like the one that the kernel's IMA has in securityfs, IMA (default /sys/kernel/security/ima).
//
// Each begins in a namespace of its own that nothing was set in, prints a line "ok NAME" or "not ok NAME: why" for each thing
// that it checks and at last "1..N" with their number, and exits 0 if all held. What a container can't do, because it has one
// user id only, say, is "ok NAME # skip why". They run in the shell and with the tools of busybox, and take lib.sh from their
// own folder. box.sh makes a container for them of a folder, and is no such script.
package window

import "embed"

// Scripts has all scripts, lib.sh and box.sh.
//
//go:embed *.sh
var Scripts embed.FS
