// Package nri gives Kubernetes' containers their vTPM, window and environment: it is a plugin of the Node Resource Interface,
// which containerd 2 and CRI-O have.
//
// Run connects to the runtime, and again whenever the runtime was started anew. Of each container that is to be created it asks
// oci.Containers for a Grant, and has the runtime adjust the container by it. Before the container's first program runs it says
// which process is in its namespaces; then that it has stopped, and that it is removed.
//
// # Which containers
//
// Those whose pod has the annotation imans.dev/vtpm="true" or imans.dev/policy, those of the pod namespaces in Config.Namespaces,
// and those whose pod has one of Config.Labels; imans.dev/vtpm="false" takes one out. A container's own annotations come before
// its pod's. Annotations are claimed by whoever may create pods.
//
// # What is promised
//
// No creation waits for longer than Config.Timeout. One that gets no grant by then goes on without, or fails if it is required;
// a wrong annotation always fails. A grant that came too late is given back. Containers that were created while this plugin was
// not connected are told of when it is again, if they ask for a vTPM; so is which ones are still there.
//
// BUG: the interface does not tell a plugin the id mappings of a container's user namespace: RootUID of such a request is 0. The
// agent sees them when it is told of the process.
//
// Source: github.com/containerd/nri, pkg/api/api.proto.
package nri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/nri/pkg/api"
	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/oci"
)

// Config is what the plugin works with.
type Config struct {
	Containers oci.Containers
	// There is told of all containers that the runtime has, when the plugin has connected.
	There      func(ctx context.Context, ids []string) error
	Socket     string   // of the runtime; none: /var/run/nri/nri.sock
	Namespaces []string // pod namespaces whose containers get a vTPM without asking
	Labels     []string // NAME=VALUE; so do those of a pod that has one of these
	// Timeout bounds how long a container waits for us; 0: three quarters of what the runtime allows. It drops a plugin that takes
	// longer than that, which is two seconds unless it is configured otherwise.
	Timeout time.Duration
	// Required has containers that are to get a vTPM fail without it; imans.dev/required says so for one.
	Required bool
	Log      *zap.Logger
}

// DefaultTimeout is for runtimes that do not say what they allow; it is below their default.
const DefaultTimeout = 1500 * time.Millisecond

// plugin answers a runtime. The methods' names are the interface's.
type plugin struct{ c Config }

// request is what a container asks for.
func (p *plugin) request(pod *api.PodSandbox, ctr *api.Container) (oci.Request, error) {
	r := oci.Request{ID: ctr.GetId(), VTPM: p.chosen(pod), Required: p.c.Required}
	r.Describe(ctr.GetAnnotations())
	for to, value := range map[*string]string{
		&r.Image: ctr.GetImage().GetName(), &r.ImageDigest: ctr.GetImage().GetDigest(), &r.Name: ctr.GetName(), &r.Pod: pod.GetName(),
		&r.Namespace: pod.GetNamespace(),
	} {
		if value != "" {
			*to = value
		}
	}
	r.UserNamespace = hasUserNamespace(ctr)
	if err := r.Ask(pod.GetAnnotations()); err != nil {
		return r, fmt.Errorf("pod %s/%s: %w", pod.GetNamespace(), pod.GetName(), err)
	}
	if err := r.Ask(ctr.GetAnnotations()); err != nil {
		return r, fmt.Errorf("container %s of pod %s/%s: %w", ctr.GetName(), pod.GetNamespace(), pod.GetName(), err)
	}
	return r, r.Check()
}

// chosen reports whether a pod's containers get a vTPM without asking.
func (p *plugin) chosen(pod *api.PodSandbox) bool {
	return slices.Contains(p.c.Namespaces, pod.GetNamespace()) || slices.ContainsFunc(p.c.Labels, func(label string) bool {
		name, value, _ := strings.Cut(label, "=")
		has, ok := pod.GetLabels()[name]
		return ok && has == value
	})
}

func hasUserNamespace(ctr *api.Container) bool {
	return slices.ContainsFunc(ctr.GetLinux().GetNamespaces(), func(n *api.LinuxNamespace) bool { return n.GetType() == "user" })
}

// CreateContainer has a container adjusted by what it is granted.
func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	r, err := p.request(pod, ctr)
	if err != nil {
		return nil, nil, err
	}
	if !r.Wants() {
		return nil, nil, nil
	}
	g, err := p.prepare(ctx, r)
	var adjustment *api.ContainerAdjustment
	if err == nil {
		if adjustment, err = adjust(ctr, g); err != nil {
			p.tell("give back the grant of", r.ID, p.c.Containers.Removed(ctx, r.ID))
		}
	}
	if err != nil && r.Required {
		return nil, nil, fmt.Errorf("container %s of pod %s/%s is not created without what it asks for: %w", r.Name, r.Namespace, r.Pod, err)
	}
	if err != nil {
		p.c.Log.Warn("a container goes on without a vTPM", zap.String("container", r.ID), zap.String("pod", r.Namespace+"/"+r.Pod), zap.Error(err))
	}
	return adjustment, nil, nil
}

// prepare returns within the time that there is, though what it asks may not.
func (p *plugin) prepare(ctx context.Context, r oci.Request) (oci.Grant, error) {
	type answer struct {
		grant oci.Grant
		err   error
	}
	wait, cancel := context.WithTimeout(ctx, p.c.Timeout)
	defer cancel()
	answered := make(chan answer, 1)
	go func() {
		g, err := p.c.Containers.Prepare(wait, r)
		answered <- answer{g, err}
	}()
	select {
	case a := <-answered:
		return a.grant, a.err
	case <-wait.Done():
	}
	go func() {
		if a := <-answered; a.err == nil {
			p.tell("give back the late grant of", r.ID, p.c.Containers.Removed(context.WithoutCancel(ctx), r.ID))
		}
	}()
	return oci.Grant{}, fmt.Errorf("prepare it within %v: %w; keep more vTPMs ready", p.c.Timeout, context.Cause(wait))
}

// StartContainer is called before the container's first program runs.
func (p *plugin) StartContainer(ctx context.Context, pod *api.PodSandbox, ctr *api.Container) error {
	r, err := p.request(pod, ctr)
	if err != nil || !r.Wants() {
		return nil // it was not created, or not by us
	}
	err = p.created(ctx, ctr)
	if err != nil && r.Required {
		return fmt.Errorf("container %s of pod %s/%s does not start without its vTPM: %w", r.Name, r.Namespace, r.Pod, err)
	}
	p.tell("attach the vTPM of", r.ID, err)
	return nil
}

// created says which process is in a container's namespaces.
func (p *plugin) created(ctx context.Context, ctr *api.Container) error {
	if ctr.GetPid() == 0 {
		return errors.New("the runtime does not say which process the container's is; use containerd 2 or newer, or the OCI runtime wrapper")
	}
	ctx, cancel := context.WithTimeout(ctx, p.c.Timeout)
	defer cancel()
	return p.c.Containers.Created(ctx, ctr.GetId(), int(ctr.GetPid()))
}

// StopContainer is called when a container's processes have ended.
func (p *plugin) StopContainer(ctx context.Context, _ *api.PodSandbox, ctr *api.Container) ([]*api.ContainerUpdate, error) {
	ctx, cancel := context.WithTimeout(ctx, p.c.Timeout)
	defer cancel()
	p.tell("tell of the end of", ctr.GetId(), p.c.Containers.Stopped(ctx, ctr.GetId()))
	return nil, nil
}

// RemoveContainer is called when a container is removed.
func (p *plugin) RemoveContainer(ctx context.Context, _ *api.PodSandbox, ctr *api.Container) error {
	ctx, cancel := context.WithTimeout(ctx, p.c.Timeout)
	defer cancel()
	p.tell("tell of the removal of", ctr.GetId(), p.c.Containers.Removed(ctx, ctr.GetId()))
	return nil
}

// Synchronize is called with what there is when the plugin has connected.
func (p *plugin) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	ctx, cancel := context.WithTimeout(ctx, p.c.Timeout)
	defer cancel()
	var ids []string
	for _, ctr := range containers {
		ids = append(ids, ctr.GetId())
	}
	if err := p.c.There(ctx, ids); err != nil {
		p.c.Log.Warn("could not tell which containers are still there", zap.Error(err))
	}
	for _, ctr := range containers {
		i := slices.IndexFunc(pods, func(pod *api.PodSandbox) bool { return pod.GetId() == ctr.GetPodSandboxId() })
		if i < 0 || ctr.GetPid() == 0 {
			continue
		}
		if r, err := p.request(pods[i], ctr); err == nil && r.Wants() && ctx.Err() == nil {
			p.tell("attach the vTPM of", r.ID, p.created(ctx, ctr))
		}
	}
	return nil, nil
}

// tell logs what could not be done about a container, which goes on.
func (p *plugin) tell(what, id string, err error) {
	if err != nil {
		p.c.Log.Warn("could not "+what+" a container", zap.String("container", id), zap.Error(err))
	}
}
