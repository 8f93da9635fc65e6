// Command latency runs programs that were never measured, as the agent is to find them, and times bare extends of the machine's TPM.
//
//	latency run FOLDER COUNT PAUSE    runs COUNT programs, a PAUSE apart (5ms; 0s: as fast as it goes)
//	latency extends COUNT             prints the microseconds of each of COUNT extends of PCR 23
//	latency status SOCKET             prints what the agent says: its count, and p50, p99 and max in microseconds
//
// Exit status: 0 done; 1 it could not be done; 2 misuse.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"imans.dev/imans-agent/internal/control"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext"
)

func main() {
	args := os.Args[1:]
	var err error
	switch {
	case len(args) == 4 && args[0] == "run":
		err = runPrograms(args[1], args[2], args[3])
	case len(args) == 2 && args[0] == "extends":
		err = extends(args[1])
	case len(args) == 2 && args[0] == "status":
		err = status(args[1])
	default:
		fmt.Fprintln(os.Stderr, "latency: want run FOLDER COUNT PAUSE, extends COUNT or status SOCKET")
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "latency:", err)
		os.Exit(1)
	}
}

func runPrograms(dir, count, pause string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	apart, err := time.ParseDuration(pause)
	if err != nil {
		return err
	}
	program, err := os.ReadFile("/payload/static")
	if err != nil {
		return err
	}
	var paths []string
	for i := range n { // written first: a program is small, and a disk is not what is measured
		path := filepath.Join(dir, fmt.Sprintf("p%d-%s", i, pause))
		if err := os.WriteFile(path, append(bytes.Clone(program), path...), 0o755); err != nil {
			return err
		}
		paths = append(paths, path)
	}
	for _, path := range paths {
		if err := exec.Command(path).Run(); err != nil {
			return err
		}
		time.Sleep(apart)
	}
	return nil
}

func extends(count string) error {
	n, err := strconv.Atoi(count)
	if err != nil {
		return err
	}
	ctx := context.Background()
	tpm, err := tpmext.Open(ctx, "/dev/tpmrm0")
	if err != nil {
		return err
	}
	defer tpm.Close()
	var digests []ima.Digest
	for _, bank := range tpm.Banks() {
		digests = append(digests, ima.ZeroDigest(bank))
	}
	for range n {
		begun := time.Now()
		if err := tpm.Extend(ctx, 23, digests); err != nil {
			return err
		}
		fmt.Printf("bare extend %d\n", time.Since(begun).Microseconds())
	}
	return nil
}

func status(socket string) error {
	s, err := control.NewClient(socket).Status(context.Background())
	if err != nil {
		return err
	}
	b, err := json.Marshal(s.Latency)
	if err != nil {
		return err
	}
	fmt.Println(string(b))
	return nil
}
