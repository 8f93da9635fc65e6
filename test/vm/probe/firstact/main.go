// Command firstact looks, as the first thing it does, for its own entry in a list, and whether the list's TPM has it.
//
//	#!/usr/local/bin/firstact LOG SOCKET NAMESPACE [wait]
//
// It is the interpreter of a script, whose entry is looked for: each script is a program of its own, and small.
// How much is extended is asked first: what is extended later does not count. Exit status: 0 the TPM has it;
// 1 the entry is not there, or not extended; 2 misuse, or it could not be found out. With wait it looks until the TPM has it, for a minute,
// and prints how many microseconds after its start that was: 0 if it was so at the first look.
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
	err := look(args, os.Args[2])
	var after time.Duration
	for wait && err != nil && after < time.Minute {
		time.Sleep(200 * time.Microsecond)
		err, after = look(args, os.Args[2]), time.Since(began)
	}
	if err != nil {
		fmt.Println("firstact:", err)
		os.Exit(1)
	}
	if wait {
		fmt.Println(after.Microseconds())
	}
}

// look returns why the TPM does not have the entry of a name.
func look(args []string, name string) error {
	entries, err := extended(args[1], args[2])
	if err != nil {
		return err
	}
	return find(args[0], name, entries)
}

// extended returns how many of a list's entries are in its TPM.
func extended(socket, namespace string) (int, error) {
	n, err := control.NewClient(socket).Namespace(context.Background(), namespace)
	return n.Extended, err
}

func find(log, name string, extended int) error {
	f, err := os.Open(log)
	if err != nil {
		return err
	}
	defer f.Close()
	r := imalog.NewReader(f, ima.SHA1)
	for number := 1; ; number++ {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("%s has no entry", name)
		} else if err != nil {
			return err
		}
		if e.Name() != name || e.Violation() {
			continue
		}
		if number > extended {
			return fmt.Errorf("%s is entry %d, and %d are extended", name, number, extended)
		}
		return nil
	}
}
