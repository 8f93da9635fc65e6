package policy

// Label is a part of a security module's label, of the file (object) or of the task (subject). SELinux has all six;
// other modules keep their whole label in ObjUser and SubjUser.
type Label uint8

// The labels, in the kernel's order.
const (
	ObjUser Label = iota
	ObjRole
	ObjType
	SubjUser
	SubjRole
	SubjType
	numLabels
)

var labelNames = [numLabels]string{"obj_user", "obj_role", "obj_type", "subj_user", "subj_role", "subj_type"}

// String returns the word of the language.
func (l Label) String() string { return labelNames[l] }

// Labels holds one string for each Label; "" in a rule matches anything, in an event it means that there is none.
type Labels [numLabels]string

// match reports whether an event's labels are those that a rule names.
func (want Labels) match(has Labels) bool {
	for i, label := range want {
		if label != "" && label != has[i] {
			return false
		}
	}
	return true
}
