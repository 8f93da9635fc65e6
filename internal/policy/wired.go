package policy

import (
	"errors"
	"fmt"
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// Wired is what a program does of the language. The zero value does nothing.
type Wired struct {
	Funcs     []ima.Func
	Actions   []Action // without the dont_ ones, which ask for nothing
	Templates []string // that a rule may name
	MaxPCR    int
	Labels    bool // Query.Labels is filled in
	FSSubtype bool // Query.FSSubtype is filled in
	Verity    bool // Decision.Verity is heeded
}

// CheckWired refuses, with *SyntaxError, a policy that asks for more than a program does: a rule is never ignored. name
// stands for the policy in the error. A rule that says dont_ asks for nothing and passes, whatever its function, as
// long as its conditions can be looked at.
func (p *Policy) CheckWired(name string, w Wired) error {
	for _, r := range p.rules {
		if err := w.check(r); err != nil {
			return &SyntaxError{File: name, Line: r.Line, Rule: r.Text, Reason: err.Error()}
		}
	}
	return nil
}

func (w Wired) check(r *Rule) error {
	switch {
	case r.labels != (Labels{}) && !w.Labels:
		return errors.New("labels of security modules are not looked at yet; remove the condition, or the rule")
	case r.has(flagFSSubtype) && !w.FSSubtype:
		return errors.New("fs_subtype= is not looked at yet; remove the condition, or the rule")
	case r.has(flagVerity) && !w.Verity:
		return errors.New("digest_type=verity is not done yet; remove it, or the rule")
	}
	if adds, _ := r.Action.does(); adds == 0 {
		return nil
	}
	switch {
	case !slices.Contains(w.Actions, r.Action):
		return fmt.Errorf("the action %v is not done yet, only %v; remove the rule", r.Action, w.Actions)
	case !r.has(flagFunc):
		return fmt.Errorf("without func= the rule asks for functions that are not done yet; add one of %v", w.Funcs)
	case !slices.Contains(w.Funcs, r.Func):
		return fmt.Errorf("func=%v is not done yet, only %v; remove the rule", r.Func, w.Funcs)
	case r.template != "" && !slices.Contains(w.Templates, r.template):
		return fmt.Errorf("template=%s is not filled yet; remove it, or use one of %v", r.template, w.Templates)
	case r.has(flagPCR) && r.pcr > w.MaxPCR:
		return fmt.Errorf("pcr=%d is more than a TPM has; use 0 to %d", r.pcr, w.MaxPCR)
	}
	return nil
}
