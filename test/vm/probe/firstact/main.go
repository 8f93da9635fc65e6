// Command firstact looks, as the first thing it does, for its own entry in a list, and whether the list's TPM has it.
//
//	#!/usr/local/bin/firstact LOG SOCKET NAMESPACE [wait]
//
// It is the interpreter of a script, whose entry is looked for: each script is a program of its own, and small.
// How much is extended is asked first: what is extended later does not count. Then the TPM's own register has to bear that out; it is
// no first question, since a TPM that is busy answers only when what was under way is extended. Exit status: 0 the TPM has it;
// 1 the entry is not there, or not extended, or that could not be found out; 2 misuse. With wait it looks until the TPM has it by what
// the agent says, for a minute, and prints how many microseconds after its start that was: 0 if it was so at the first look.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"imans.dev/imans-agent/internal/control"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/verify"
)

func main() {
	began := time.Now()
	var args []string
	if len(os.Args) == 3 {
		args = strings.Fields(os.Args[1]) // a script's first line has one argument, however many words
	}
	wait := len(args) == 4 && args[3] == "wait"
	if len(args) != 3 && !wait {
		fmt.Fprintln(os.Stderr, "firstact: want to be the interpreter of a script, with LOG SOCKET NAMESPACE [wait]")
		os.Exit(2)
	}
	l := list{log: args[0], namespace: args[2], agent: control.NewClient(args[1])}
	number, err := l.look(os.Args[2])
	var after time.Duration
	for wait && err != nil && after < time.Minute {
		time.Sleep(200 * time.Microsecond)
		_, err = l.look(os.Args[2])
		after = time.Since(began)
	}
	if err == nil && !wait {
		err = l.proven(number)
	}
	if err != nil {
		fmt.Println("firstact:", err)
		os.Exit(1)
	}
	if wait {
		fmt.Println(after.Microseconds())
	}
}

// list is a namespace's list, by its log and by the agent.
type list struct {
	log, namespace string
	agent          *control.Client
}

// look returns which entry is that of a name, the first being 1, or why the TPM does not have it.
func (l list) look(name string) (number int, err error) {
	ns, err := l.agent.Namespace(context.Background(), l.namespace)
	if err != nil {
		return 0, err
	}
	f, err := os.Open(l.log)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	r := imalog.NewReader(f, ima.SHA1)
	for number = 1; ; number++ {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return 0, fmt.Errorf("%s has no entry", name)
		} else if err != nil {
			return 0, err
		}
		if e.Name() != name || e.Violation() {
			continue
		}
		if number > ns.Extended {
			return 0, fmt.Errorf("%s is entry %d, and %d are extended", name, number, ns.Extended)
		}
		return number, nil
	}
}

// proven returns an error if the TPM's register does not prove the first entries.
func (l list) proven(number int) error {
	p, err := l.agent.PCRs(context.Background(), l.namespace)
	if err != nil {
		return err
	}
	digests, err := p.Digests()
	if err != nil {
		return err
	}
	values := make(map[ima.HashAlgo]ima.Digest) // of one bank: a thousand programs replay up to a thousand entries each
	for _, d := range digests {
		if d.Algo() == ima.SHA256 {
			values[d.Algo()] = d
		}
	}
	f, err := os.Open(l.log)
	if err != nil {
		return err
	}
	defer f.Close()
	res, err := verify.List(f, verify.Options{PCRs: map[int]map[ima.HashAlgo]ima.Digest{p.PCR: values}})
	if err != nil {
		return err
	}
	if !res.Proven.Matched || res.Proven.Prefix < number {
		return fmt.Errorf("entry %d counts as extended, and the TPM proves %d: %v", number, res.Proven.Prefix, res.Err())
	}
	return nil
}
