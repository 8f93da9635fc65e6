package grant

import (
	"errors"
	"fmt"
	"os"

	"imans.dev/imans-agent/internal/vtpm"
)

// Left returns where the TPMs are that the containers with a record below dir were granted by an earlier agent, running or not. With an
// error it is those of the records that can be read.
func Left(dir string) ([]vtpm.Config, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("containers' folder: %w", err)
	}
	g := &Containers{Config: Config{Dir: dir}}
	var left []vtpm.Config
	var errs []error
	for _, e := range entries {
		c, err := g.open(e.Name())
		if errors.Is(err, os.ErrNotExist) {
			continue // a crash before the record: nothing was started for it
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("container %s: %w; its vTPMs may go on, end them by hand", e.Name(), err))
			continue
		}
		for n := range c.Request.VTPMs {
			left = append(left, g.config(c, n))
		}
	}
	return left, errors.Join(errs...)
}
