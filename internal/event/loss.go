// Code generated from bpf/loss.json by tools/bpf2go. DO NOT EDIT.

package event

// Loss is a reason for which an event did not become an ordinary entry. docs/losses.md explains each.
type Loss uint32

// The reasons of bpf/loss.json.
const (
	LossRingBufferFull   Loss = 1  // kernel side
	LossNamespaceMapFull Loss = 2  // kernel side
	LossNoMountNamespace Loss = 3  // kernel side
	LossFileUnreachable  Loss = 4  // agent side
	LossContentChanged   Loss = 5  // agent side
	LossOpenWriters      Loss = 6  // agent side
	LossReadError        Loss = 7  // agent side
	LossUndecodableEvent Loss = 8  // agent side
	LossProgramsReplaced Loss = 9  // agent side
	LossPathUnknown      Loss = 10 // agent side
	LossNoNamespaceID    Loss = 11 // agent side
	LossVtpmLost         Loss = 12 // agent side
	LossListEnded        Loss = 13 // agent side
	LossTomtou           Loss = 14 // agent side
	LossProgramSkipped   Loss = 15 // kernel side
	LossNotGated         Loss = 16 // agent side
	LossHoldsDropped     Loss = 17 // agent side
	LossWriterLost       Loss = 18 // kernel side
)

var lossNames = [...]string{"none", "ring_buffer_full", "namespace_map_full", "no_mount_namespace", "file_unreachable", "content_changed", "open_writers", "read_error", "undecodable_event", "programs_replaced", "path_unknown", "no_namespace_id", "vtpm_lost", "list_ended", "tomtou", "program_skipped", "not_gated", "holds_dropped", "writer_lost"}

// String returns the name that violation entries carry.
func (l Loss) String() string {
	if int(l) < len(lossNames) {
		return lossNames[l]
	}
	return "unknown"
}
