package oci

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// VTPM is one entry of linux.resources.vtpms, in the form that was proposed for runc and the runtime specification.
type VTPM struct {
	StatePath string `json:"statePath,omitempty"` // folder of the TPM's state on the host; none: the agent's choice
	// StatePathIsManaged says that somebody else makes and removes that folder: it outlives the container.
	StatePathIsManaged bool   `json:"statePathIsManaged,omitempty"`
	Version            string `json:"vtpmVersion,omitempty"`        // 1.2 or 2; none: 2
	CreateCerts        bool   `json:"createCerts,omitempty"`        // make an endorsement key's certificate
	RunAs              string `json:"runAs,omitempty"`              // user that the TPM's process runs as
	PCRBanks           string `json:"pcrBanks,omitempty"`           // names with commas between them; none: the agent's choice
	EncryptionPassword string `json:"encryptionPassword,omitempty"` // of the state; never shown
	Name               string `json:"vtpmName,omitempty"`           // of the device: tpm0 if there is none
}

// vtpmsMax bounds how many vTPMs one container may have.
const vtpmsMax = 16

// banks are the hashes that a TPM may have banks of; one of version 1.2 has SHA-1 alone.
var banks = []string{"sha1", "sha256", "sha384", "sha512", "sha3-256", "sha3-384", "sha3-512", "sm3-256"}

// Banks returns the PCR banks asked for; nil leaves them to the agent.
func (v VTPM) Banks() []string {
	if v.PCRBanks == "" {
		return nil
	}
	return strings.Split(v.PCRBanks, ",")
}

func parseVTPM(field string, raw json.RawMessage) (VTPM, error) {
	var v VTPM
	if err := decode(field, raw, &v, "want an object"); err != nil { // it shows no member's value: one is a password
		return v, err
	}
	return v, v.check(field)
}

func (v VTPM) check(field string) error {
	switch {
	case v.StatePath != "" && (!absolute(v.StatePath) || strings.Contains(v.StatePath+"/", "/../")):
		return &FieldError{field + ".statePath", quote(v.StatePath), "want an absolute path without .."}
	case v.StatePathIsManaged && v.StatePath == "":
		return &FieldError{field + ".statePathIsManaged", "true", "want a statePath with it"}
	case v.Version != "" && v.Version != "1.2" && v.Version != "2" && v.Version != "2.0":
		return &FieldError{field + ".vtpmVersion", quote(v.Version), `want "1.2" or "2"`}
	case v.RunAs != "" && (!isName(v.RunAs) || len(v.RunAs) > 32):
		return &FieldError{field + ".runAs", quote(v.RunAs), "want a user's name or number"}
	case v.Name != "" && !isName(v.Name):
		return &FieldError{field + ".vtpmName", quote(v.Name), nameReason}
	}
	for _, bank := range v.Banks() {
		if !slices.Contains(banks, bank) {
			return &FieldError{field + ".pcrBanks", quote(v.PCRBanks), "want names with commas between them, of " + strings.Join(banks, ", ")}
		}
		if v.Version == "1.2" && bank != "sha1" {
			return &FieldError{field + ".pcrBanks", quote(v.PCRBanks), "a TPM 1.2 has the bank sha1 alone"}
		}
	}
	return nil
}

// checkVTPMs checks what several have to do with each other.
func checkVTPMs(list []VTPM) error {
	if len(list) > vtpmsMax {
		return &FieldError{"linux.resources.vtpms", fmt.Sprintf("a list of %d", len(list)), fmt.Sprintf("want at most %d", vtpmsMax)}
	}
	seen := make(map[string]bool)
	for i, v := range list {
		for field, value := range map[string]string{"statePath": v.StatePath, "vtpmName": v.Name} {
			if value == "" {
				continue
			}
			if seen[field+value] {
				return &FieldError{fmt.Sprintf("linux.resources.vtpms[%d].%s", i, field), quote(value), "another one has the same"}
			}
			seen[field+value] = true
		}
	}
	return nil
}
