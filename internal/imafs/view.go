package imafs

import (
	"context"
	"errors"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/measure"
)

// ErrEnded is what a Views or View returns for a namespace that is gone.
var ErrEnded = errors.New("the namespace has ended")

// Views finds namespaces. It is the agent's, over namespace.Tree, and in tests one over lists of their own. For concurrent use.
type Views interface {
	// View returns the view of a mount namespace. A namespace can ask about itself before its birth was handled: wait for that.
	// The ID is 0 where the kernel does not tell it (before 6.11): then the youngest of that inode number is meant.
	View(ctx context.Context, ns event.MountNS) (View, error)
}

// View is one namespace, as its window shows it. For concurrent use; after the namespace's end too, when Ended is closed and
// what fails does so with ErrEnded.
//
// An error that is or wraps a syscall.Errno is what the caller of the file gets; else EINVAL from SetHash, SetTemplate and
// CheckPolicy, EAGAIN for a deadline, EINTR for a context cancelled, ENODEV for ErrEnded, EIO for the rest.
type View interface {
	Ended() <-chan struct{}
	Owner() Owner
	Active() bool
	// Lazy says that writing a policy makes an inactive namespace active.
	Lazy() bool
	// Activate makes the namespace active. It is done when it returns. It may be called again.
	Activate(ctx context.Context) error
	HashName() string
	SetHash(name string) error
	TemplateName() string
	SetTemplate(name string) error
	// RequestNew makes the next mount namespace cloned by the caller's process tree an IMA namespace.
	RequestNew(ctx context.Context, c *Caller) error
	// WithdrawNew takes back what the caller's process tree asked for and no clone has taken.
	WithdrawNew(ctx context.Context, c *Caller) error
	// Requested reports whether a mount namespace that the caller cloned now would be one that was asked for.
	Requested(ctx context.Context, c *Caller) (bool, error)
	// Barrier waits until all that the kernel recorded before the call is in the lists.
	Barrier(ctx context.Context) error
	// List is the measurement list; nil before activation.
	List() *measure.List
	// PolicyText prints the rules as the kernel's file does, with the ids that the caller sees.
	PolicyText(c *Caller) string
	// CheckPolicy says why one or more lines would be refused by themselves. Ids in them are as the caller sees them.
	CheckPolicy(c *Caller, text []byte) error
	// AppendPolicy adds lines that passed CheckPolicy. They are in effect when it returns. The caller may be gone by then.
	AppendPolicy(ctx context.Context, c *Caller, text []byte) error
}

// Owner is root of a namespace's user namespace, as host ids.
type Owner struct{ UID, GID uint32 }

// Caller is the task that made a request, as it was then. All numbers are the host's. Read only.
type Caller struct {
	TID, TGID uint32
	NS        event.MountNS
	UID, GID  uint32    // the ids for file access
	UserNS    uint32    // inode number of its user namespace
	UIDs      ima.IDMap // of that user namespace
	GIDs      ima.IDMap
}
