package policy

import "fmt"

// SyntaxError is a rule that is refused: not of the language, or (CheckWired) not done by this program.
type SyntaxError struct {
	File   string // as the caller named it
	Line   int    // from 1
	Rule   string // as it was written
	Reason string // what is wrong; after the last semicolon, what to do
}

// Error tells where, what, why and what to do, in this order.
func (e *SyntaxError) Error() string {
	return fmt.Sprintf("%s:%d: %q: %s", e.File, e.Line, e.Rule, e.Reason)
}
