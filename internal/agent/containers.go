package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/container"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/grant"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/proc"
	"imans.dev/imans-agent/internal/reach"
	"imans.dev/imans-agent/internal/vtpm"
)

// refillAfter is how long the pool rests after it could not make a TPM.
const refillAfter = time.Minute

// containers is what gives containers their vTPMs.
type containers struct {
	granted *grant.Containers
	pool    *vtpm.Pool
}

func openAuthority(c Config) (*vtpm.Authority, error) {
	return vtpm.OpenAuthority(filepath.Join(c.StateDir, "authority"))
}

func openPool(ctx context.Context, c Config, a *vtpm.Authority) (*vtpm.Pool, error) {
	return vtpm.OpenPool(ctx, vtpm.PoolConfig{
		Dir: filepath.Join(c.StateDir, "pool"), Size: c.Pool, Program: c.Swtpm, User: c.SwtpmUser, Authority: a,
	})
}

// containersDir is the folder of the containers' folders in the state folder.
func containersDir(stateDir string) string { return filepath.Join(stateDir, "containers") }

// openContainers finds what an earlier agent left. ctx is the agent's life.
func openContainers(ctx context.Context, c Config, p *pump, tree *namespace.Tree, ways *reach.Ways, log *zap.Logger) (*containers, error) {
	authority, err := openAuthority(c)
	if err != nil {
		return nil, err
	}
	pool, err := openPool(ctx, c, authority)
	if err != nil {
		return nil, err
	}
	granted, err := grant.Open(grant.Config{
		Dir: containersDir(c.StateDir), Pool: pool, Authority: authority, Swtpm: c.Swtpm, User: c.SwtpmUser,
		Tree: tree, Ways: ways, Log: log.Named("containers"),
		Do: func(_ context.Context, change func(context.Context) error) error { return p.do(ctx, change) },
		Load: func(ctx context.Context, ns event.MountNS, name string) error {
			return loadNamed(ctx, tree, c.PolicyDir, ns, name)
		},
		Process: func(inum uint32) (int, string, error) {
			t, err := container.Process(inum)
			return t.PID, proc.CgroupName(t.PID), err
		},
	})
	return &containers{granted, pool}, err
}

// fill keeps the pool full. That it can't be is no reason to stop measuring.
func fill(ctx context.Context, pool *vtpm.Pool, log *zap.Logger) error {
	for ctx.Err() == nil {
		err := pool.Run(ctx)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		log.Warn("no vTPM can be made for the pool; tried again in a minute", zap.Error(err))
		select {
		case <-ctx.Done():
		case <-time.After(refillAfter):
		}
	}
	return nil
}

// loadNamed gives a namespace the rules of a file in the policies' folder. Ids are the host's.
func loadNamed(ctx context.Context, tree *namespace.Tree, dir string, ns event.MountNS, name string) error {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("policy %s: there is none in %s; put it there, or name another in the annotation", name, dir)
	} else if err != nil {
		return fmt.Errorf("policy %s: %w", name, err)
	}
	rules, err := parseRules(text)
	if err != nil {
		return fmt.Errorf("policy %s: %w", name, err)
	}
	if err := tree.Activate(ctx, ns); err != nil {
		return err
	}
	return tree.AppendPolicy(ctx, ns, rules, ima.InitialMaps())
}
