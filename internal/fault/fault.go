// Package fault names the steps at which a test has the agent die, to see what the next one finds.
//
// With the build tag faults Pass ends the process by SIGKILL, as a crash does: nothing deferred runs, nothing is flushed. Which point it
// is, and at which pass, the environment says (Variable). Without the tag, as users have the agent, Pass is empty and nothing reads the
// environment.
//
// A point is named here and passed at one step of the code; the test takes them all from All, and fails for one that is never passed.
package fault

// Variable is the environment variable that arms a point: NAME:PASS, such as log-torn:3, the third time.
const Variable = "IMANS_FAULT"

// Point is a step.
type Point int

// The points, in the order in which what happens to a file or a namespace passes them.
const (
	// RecordTaken: a record was read from the ring buffer.
	RecordTaken Point = iota
	// RecordHashed: the digest of a file is known.
	RecordHashed
	// ViolationNoted: it is on disk which record a violation is of, and the violation is not in the list yet.
	ViolationNoted
	// RecordAppended: a record's entries are handed to their lists.
	RecordAppended
	// LogWrite: entries are about to be written to a log.
	LogWrite
	// LogTorn: all of their bytes but the last are, so that an entry is incomplete however many they are.
	LogTorn
	// LogWritten: all of them are, and not synced.
	LogWritten
	// LogSynced: they are durable, and nobody was told.
	LogSynced
	// LogTold: readers and the extender see them.
	LogTold
	// Extend: an entry is about to be extended. TPM2_PCR_Extend does all banks at once.
	Extend
	// Extended: it is, and nobody noted it.
	Extended
	// ExtendNoted: who waited for that was told.
	ExtendNoted
	// RecordLogged: a batch's entries are all in their logs, and nothing is marked as measured.
	RecordLogged
	// RecordMarked: its contents are, and its records are the ring buffer's still.
	RecordMarked
	// RecordCommitted: they are given back.
	RecordCommitted
	// ListCut: an incomplete entry, which a torn write left, is about to be removed.
	ListCut
	// ListRecovered: a list is open, and nothing was extended since.
	ListRecovered
	// FileWritten: a file is about to take the place of its older version.
	FileWritten
	// FileReplaced: it has, and its folder is not synced.
	FileReplaced
	// KernelSideTold: the lists say that the kernel side is another than they know, and the next agent does not know that they do.
	KernelSideTold
	// NamespaceBorn: a namespace is in the tree, and the kernel side does not know its policy.
	NamespaceBorn
	// NamespaceFolder: it has a folder, with nothing in it.
	NamespaceFolder
	// NamespaceRecorded: the folder says whose it is, and there is no list.
	NamespaceRecorded
	// VTPMFolder: there is a folder for its vTPM, and neither list nor vTPM.
	VTPMFolder
	// VTPMStarted: swtpm runs.
	VTPMStarted
	// VTPMServing: it answers, and is not on record.
	VTPMServing
	// VTPMRecorded: it is on record, and nothing was extended.
	VTPMRecorded
	// GrantAsked: a container or a namespace is to be given a vTPM, which is on record, and none was taken.
	GrantAsked
	// GrantMade: the vTPM has its keys, and its folder does not say so.
	GrantMade
	// GrantTaken: it is in the folder that it is for.
	GrantTaken
	// GrantAttached: the namespace's folder names it, the native list does not.
	GrantAttached
	// GrantTold: the native list names it, and it has nothing of the list.
	GrantTold
	// GrantAnchored: the list has gone over to it.
	GrantAnchored
	// GrantEndDecided: what the native list will say of its end is on record.
	GrantEndDecided
	// GrantEndTold: the native list says so, and the vTPM runs.
	GrantEndTold
	// NamespaceEnding: a namespace is out of the tree, and all of it is there.
	NamespaceEnding
	// NamespaceArchiving: its folder in the archive is whole, under another name.
	NamespaceArchiving
	// NamespaceArchived: it is in the archive.
	NamespaceArchived
	// NamespaceStopped: its vTPM has ended, and its folder is there.
	NamespaceStopped
	// NamespaceRemoved: its folder is gone.
	NamespaceRemoved
	end
)

// names are as Variable has them.
var names = [...]string{
	RecordTaken: "record-taken", RecordHashed: "record-hashed", ViolationNoted: "record-violation-noted", RecordAppended: "record-appended",
	LogWrite: "log-write", LogTorn: "log-torn", LogWritten: "log-written", LogSynced: "log-synced", LogTold: "log-told",
	Extend: "extend", Extended: "extend-done", ExtendNoted: "extend-noted",
	RecordLogged: "record-logged", RecordMarked: "record-marked", RecordCommitted: "record-committed",
	ListCut: "list-cut", ListRecovered: "list-recovered", FileWritten: "file-written", FileReplaced: "file-replaced",
	KernelSideTold: "kernel-side-told", NamespaceBorn: "ns-born", NamespaceFolder: "ns-folder", NamespaceRecorded: "ns-recorded",
	VTPMFolder: "vtpm-folder", VTPMStarted: "vtpm-started", VTPMServing: "vtpm-serving", VTPMRecorded: "vtpm-recorded",
	GrantAsked: "grant-asked", GrantMade: "grant-made", GrantTaken: "grant-taken",
	GrantAttached: "grant-attached", GrantTold: "grant-told", GrantAnchored: "grant-anchored",
	GrantEndDecided: "grant-end-decided", GrantEndTold: "grant-end-told",
	NamespaceEnding: "ns-ending", NamespaceArchiving: "ns-archiving", NamespaceArchived: "ns-archived",
	NamespaceStopped: "ns-stopped", NamespaceRemoved: "ns-removed",
}

// String returns the point's name.
func (p Point) String() string { return names[p] }

// All returns all points.
func All() []Point {
	all := make([]Point, end)
	for i := range all {
		all[i] = Point(i)
	}
	return all
}
