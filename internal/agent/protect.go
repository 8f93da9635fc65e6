package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/vtpm"
)

// refusedEvery is how often the agent looks whether an attempt on it was refused.
const refusedEvery = 10 * time.Second

// protection is the kernel's, of the agent and what it starts; nil without --protect.
type protection struct {
	kernel *loader.Protection
	log    *zap.Logger
}

// protect opens the protection, which is before the kernel side, as that is protected by it. vTPMs that an earlier agent started without one
// are protected from now on. Without --protect it takes out an earlier agent's. boot is the folder of this boot's state.
func protect(c Config, boot string, log *zap.Logger) (*protection, error) {
	if !c.Protect {
		return nil, loader.RemoveProtection(c.PinDir)
	}
	kernel, err := loader.OpenProtection(c.PinDir)
	if err != nil {
		return nil, err
	}
	p := &protection{kernel, log.Named("protection")}
	left, err := leftVTPMs(c, boot)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look for vTPMs to protect: %w", err), p.close())
	}
	for _, config := range left {
		i, err := vtpm.Adopt(config)
		if err != nil {
			continue // there is none, or whoever needs it will say what is wrong
		}
		if err := errors.Join(kernel.Add(i.PID()), i.Close()); err != nil {
			return nil, errors.Join(err, p.close())
		}
	}
	return p, nil
}

func (p *protection) close() error {
	if p == nil {
		return nil
	}
	return p.kernel.Close()
}

// watch says what was refused, until ctx ends.
func (p *protection) watch(ctx context.Context) error {
	if p == nil {
		return nil
	}
	tick := time.NewTicker(refusedEvery)
	defer tick.Stop()
	for told := uint64(0); ; {
		count, err := p.kernel.Refused()
		if err != nil {
			return err
		}
		if count > told {
			p.log.Warn("attempts from containers on the agent, its vTPMs or its pins were refused", zap.Uint64("since loaded", count))
			told = count
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
