package oci

import "fmt"

// FieldError says which field of a spec is wrong. Whoever wrote the spec has to mend it; no other try helps.
type FieldError struct {
	Field  string // as linux.resources.vtpms[0].pcrBanks
	Value  string // shortened; empty: not shown
	Reason string // what is wanted
}

func (e *FieldError) Error() string {
	if e.Value == "" {
		return fmt.Sprintf("config.json: %s: %s", e.Field, e.Reason)
	}
	return fmt.Sprintf("config.json: %s is %s: %s", e.Field, e.Value, e.Reason)
}

// shownMax bounds how much of a wrong value an error shows.
const shownMax = 60

func wrong(field string, value []byte, reason string) *FieldError {
	if len(value) > shownMax {
		value = append(append([]byte{}, value[:shownMax]...), "…"...)
	}
	return &FieldError{Field: field, Value: string(value), Reason: reason}
}
