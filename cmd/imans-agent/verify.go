package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/verify"
)

// verifyOptions is where the PCR values come from.
type verifyOptions struct {
	bank, pcr10, tpm, ns, runDir string
	pcrFile, akName              string
	pcrs                         []string
	asJSON                       bool
}

func newVerify() *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify FILE|FOLDER",
		Short: "replay a measurement list and compare it with PCR values",
		Long: `verify replays a binary measurement list (ours or the kernel's) and says what the given PCR values prove
of it, what is only claimed, and where it breaks. Without values it checks the list against itself only.
A folder is that of an ended namespace in the archive: its list, with its values unless others are given.
Whoever gives the values vouches for them: take them from a quote that was checked, or from the TPM itself.
A native list also tells which vTPMs the namespaces' lists were given. With --ak-name the list verifies only if it vouches for the
vTPM of that attestation key and does not say that it has ended.

Exit status 1 means that the list does not verify.`,
		Example: `  imans-agent verify list --ns 4026532281
  imans-agent verify list --tpm /dev/tpmrm0
  imans-agent verify list --pcr10 9c01…
  imans-agent verify list --pcr 11=sha256:9c01…
  imans-agent verify native-list --tpm /dev/tpmrm0 --ak-name 000b5e1f…`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args[0]) },
	}
	f := cmd.Flags()
	f.StringVar(&o.bank, "bank", "sha1", "bank of the list's template digests: sha1 is the classic file")
	f.StringVar(&o.pcr10, "pcr10", "", "value of PCR 10 in hexadecimal; its length tells the bank")
	f.StringVar(&o.pcrFile, "pcrs", "", "file with such values, one a line")
	f.StringArrayVar(&o.pcrs, "pcr", nil, "value of a PCR, as NUMBER=ALGORITHM:HEX; may be repeated")
	f.StringVar(&o.tpm, "tpm", "", "read the values from this TPM: a device, unix:PATH or tcp:HOST:PORT")
	f.StringVar(&o.ns, "ns", "", "ask the running agent for the values of this namespace's TPM")
	f.StringVar(&o.akName, "ak-name", "", "TPM Name, in hexadecimal, of the attestation key of a vTPM that the list must vouch for")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	addRunDir(cmd, &o.runDir)
	return cmd
}

func (o verifyOptions) run(cmd *cobra.Command, path string) error {
	bank, ok := ima.HashAlgoByName(o.bank)
	if !ok {
		return usageError{fmt.Errorf("--bank %s: want sha1, sha256, sha384 or sha512", o.bank)}
	}
	ak, err := o.ak()
	if err != nil {
		return err
	}
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		if !o.valuesGiven() {
			o.pcrFile = existing(filepath.Join(path, namespace.ArchivedPCRs))
		}
		path = filepath.Join(path, namespace.ArchivedList)
	}
	file, err := os.Open(path)
	if err != nil {
		return usageError{err}
	}
	defer file.Close()
	values, trust, err := o.values(cmd.Context(), file, bank)
	if err != nil {
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	result, err := verify.List(file, verify.Options{FileBank: bank, PCRs: values})
	if err != nil {
		return err
	}
	v := verdict{Result: result, valuesGiven: len(values) > 0, trust: trust, ak: ak}
	if o.asJSON {
		err = printJSON(cmd, v.json())
	} else {
		err = v.print(cmd)
	}
	if err == nil && !v.ok() {
		return errBad
	}
	return err
}

// ak is the attestation key that the list must vouch for; none: any list will do.
func (o verifyOptions) ak() (binding.Name, error) {
	if o.akName == "" {
		return "", nil
	}
	ak, err := binding.ParseName(o.akName)
	if err != nil {
		return "", usageError{fmt.Errorf("--ak-name: %w; it is what tpm2_readpublic prints as name", err)}
	}
	return ak, nil
}

// valuesGiven reports whether a flag says where PCR values are.
func (o verifyOptions) valuesGiven() bool {
	return o.pcr10 != "" || o.pcrFile != "" || len(o.pcrs) > 0 || o.ns != "" || o.tpm != ""
}

// existing returns the path of a file that is there, else "".
func existing(path string) string {
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	return path
}

type pcrValues map[int]map[ima.HashAlgo]ima.Digest

func (v pcrValues) add(pcr int, d ima.Digest) {
	if v[pcr] == nil {
		v[pcr] = make(map[ima.HashAlgo]ima.Digest)
	}
	v[pcr][d.Algo()] = d
}

// values collects the PCR values from wherever the flags say. trust is what stands behind those of the agent.
func (o verifyOptions) values(ctx context.Context, file io.Reader, bank ima.HashAlgo) (values pcrValues, trust backing, err error) {
	values = make(pcrValues)
	if o.pcr10 != "" {
		name, ok := map[int]string{40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}[len(o.pcr10)]
		if !ok {
			return nil, "", usageError{fmt.Errorf("--pcr10: %d digits are no digest of a bank; want 40, 64, 96 or 128", len(o.pcr10))}
		}
		o.pcrs = append(o.pcrs, "10="+name+":"+o.pcr10)
	}
	if o.pcrFile != "" {
		text, err := os.ReadFile(o.pcrFile)
		if err != nil {
			return nil, "", usageError{err}
		}
		o.pcrs = append(o.pcrs, strings.Fields(string(text))...)
	}
	for _, p := range o.pcrs {
		pcr, d, err := parsePCR(p)
		if err != nil {
			return nil, "", usageError{fmt.Errorf("--pcr %s: %w", p, err)}
		}
		values.add(pcr, d)
	}
	if o.ns != "" {
		p, err := client(o.runDir).PCRs(ctx, o.ns)
		if err != nil {
			return nil, "", err
		}
		trust = backingOf(p.Software)
		digests, err := p.Digests()
		if err != nil {
			return nil, "", err
		}
		for _, d := range digests {
			values.add(p.PCR, d)
		}
	}
	if o.tpm == "" {
		return values, trust, nil
	}
	return values, trust, readTPM(ctx, o.tpm, file, bank, values)
}

// parsePCR reads NUMBER=ALGORITHM:HEX.
func parsePCR(text string) (int, ima.Digest, error) {
	number, value, _ := strings.Cut(text, "=")
	pcr, err := strconv.ParseUint(number, 10, 8)
	if err != nil || pcr > imalog.MaxPCR {
		return 0, ima.Digest{}, fmt.Errorf("want NUMBER=ALGORITHM:HEX, the number 0 to %d", imalog.MaxPCR)
	}
	d, err := ima.ParseDigest(value)
	return int(pcr), d, err
}

// readTPM reads every register that the list extends.
func readTPM(ctx context.Context, address string, file io.Reader, bank ima.HashAlgo, values pcrValues) error {
	tpm, err := tpmext.Open(ctx, address)
	if err != nil {
		return err
	}
	defer tpm.Close()
	for pcr := range listPCRs(file, bank) {
		banks, err := tpm.ReadPCR(ctx, pcr)
		if err != nil {
			return err
		}
		for _, d := range banks {
			values.add(pcr, d)
		}
	}
	return nil
}

// listPCRs returns the registers of a list's entries, as far as it can be read: verify says where it breaks.
func listPCRs(file io.Reader, bank ima.HashAlgo) map[int]bool {
	pcrs := make(map[int]bool)
	for r := imalog.NewReader(file, bank); ; {
		e, err := r.Next()
		if err != nil {
			return pcrs
		}
		pcrs[e.PCR()] = true
	}
}
