package agent

import (
	"context"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/namespace"
)

const (
	// pollEvery is how often the ring buffer is looked at: being woken for each record would cost an exec-heavy load half its speed.
	pollEvery = 5 * time.Millisecond
	// sleepAfter is after how many looks in vain the pump sleeps until the kernel side wakes it. A barrier looks at once.
	sleepAfter = 20
	// batchMax is how many records are read before their entries are waited for.
	batchMax = 1024
	// lossEvery is how often the loss counters are looked at while records come.
	lossEvery = 250 * time.Millisecond
	// lookEvery is how often the kernel's own IMA, the vTPMs and the logs' places are looked at, and, while the pump sleeps, the loss counters too: each
	// tick of an idle agent costs the machine as much as 600 measured files.
	lookEvery = time.Second
)

// pump moves records from the kernel side into the tree, and gives them back once their entries are logged.
type pump struct {
	kernel   *loader.Kernel
	tree     *namespace.Tree
	log      *zap.Logger
	requests chan request
	sleep    chan struct{} // from run to watch: nothing comes
	woken    chan struct{} // from watch to run: something has come
	lost     bool          // among the records lost may be deaths
	expire   func()        // called once a second
}

func newPump(k *loader.Kernel, t *namespace.Tree, log *zap.Logger) *pump {
	return &pump{kernel: k, tree: t, log: log, requests: make(chan request), sleep: make(chan struct{}), woken: make(chan struct{}), expire: func() {}}
}

// catchUp handles what was recorded while no agent ran, then ends what ended meanwhile.
func (p *pump) catchUp(ctx context.Context) error {
	if err := p.watchKernelIMA(); err != nil {
		return err
	}
	if err := p.drain(ctx); err != nil {
		return err
	}
	if err := p.tree.CaughtUp(); err != nil {
		return err
	}
	return p.endUnseen(ctx)
}

// run works until ctx ends. An error is fatal to the agent: what is not committed is read again by the next one.
func (p *pump) run(ctx context.Context) error {
	poll, loss, look := time.NewTicker(pollEvery), time.NewTicker(lossEvery), time.NewTicker(lookEvery)
	defer poll.Stop()
	defer loss.Stop()
	defer look.Stop()
	for empty := 0; ; {
		var err error
		var sleep chan struct{}
		if empty == sleepAfter {
			poll.Stop()
			sleep = p.sleep
		}
		select {
		case <-ctx.Done():
			return nil
		case <-poll.C:
			var n int
			if n, err = p.batch(ctx); n > 0 {
				empty = 0
			} else if empty < sleepAfter {
				empty++
			}
		case sleep <- struct{}{}:
			empty++ // asleep
			loss.Stop()
		case <-p.woken:
			empty = 0
			poll.Reset(pollEvery)
			loss.Reset(lossEvery)
			_, err = p.batch(ctx)
		case <-loss.C:
			err = p.losses(ctx)
		case <-look.C:
			p.tree.LostTPMs(ctx)
			p.tree.RestoreLogs()
			p.expire()
			if err = p.watchKernelIMA(); err == nil && empty > sleepAfter {
				err = p.losses(ctx)
			}
			if err == nil && p.kernel.Backlog() == 0 {
				err = p.tree.TrimHolds()
			}
		case r := <-p.requests:
			err = p.answer(ctx, r)
		}
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// answer makes a change, and those that wait behind it: what was recorded before them is handled once for all.
func (p *pump) answer(ctx context.Context, first request) error {
	all := []request{first}
	for more := true; more; {
		select {
		case r := <-p.requests:
			all = append(all, r)
		default:
			more = false
		}
	}
	err := p.drain(ctx)
	for _, r := range all {
		if err != nil {
			r.reply <- err
		} else {
			r.reply <- r.change(r.ctx)
		}
	}
	return err
}

// watch waits for the kernel side's wake-up whenever run goes to sleep, until ctx ends.
func (p *pump) watch(ctx context.Context) error {
	for {
		select {
		case <-p.sleep:
		case <-ctx.Done():
			return nil
		}
		if err := p.kernel.Wait(ctx); err != nil {
			return err
		}
		select {
		case p.woken <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
	}
}

// drain handles all that is recorded when it is called, losses included, however much comes meanwhile.
func (p *pump) drain(ctx context.Context) error {
	if _, err := p.records(ctx); err != nil {
		return err
	}
	return p.losses(ctx)
}

// records handles those that are there when it is called. It reports whether that was all: what is not whole yet is left.
func (p *pump) records(ctx context.Context) (all bool, err error) {
	for end, committed := p.kernel.Positions(); committed < end; _, committed = p.kernel.Positions() {
		n, err := p.batch(ctx)
		if n == 0 || err != nil {
			return false, err
		}
	}
	return true, nil
}

// losses records what the kernel side lost, and then ends what ended unseen.
func (p *pump) losses(ctx context.Context) error {
	lost, err := p.tree.Losses(ctx, p.records)
	p.lost = p.lost || lost
	if err != nil || !p.lost {
		return err
	}
	return p.endUnseen(ctx)
}

// endUnseen ends the namespaces whose deaths nobody will tell of. Which these are is known when all is handled that was recorded before they
// were gone, what ran in them last included.
func (p *pump) endUnseen(ctx context.Context) error {
	gone, err := p.tree.Ended()
	if err != nil {
		return err
	}
	p.lost = false
	if len(gone) == 0 {
		return nil
	}
	if all, err := p.records(ctx); err != nil || !all {
		p.lost = true // later
		return err
	}
	for _, ns := range gone {
		if err := p.tree.Death(ns); err != nil {
			return err
		}
	}
	return p.tree.Finish()
}

// barrier returns when everything that the kernel side recorded before the call is in the lists.
func (p *pump) barrier(ctx context.Context) error {
	return p.do(ctx, func(context.Context) error { return nil })
}

// request is a change of the tree on its way to run.
type request struct {
	ctx    context.Context
	change func(context.Context) error
	reply  chan error
}

// do changes the tree in the goroutine of run, after all that the kernel side recorded before the call. Whether a change is made
// that ctx did not wait for is open.
func (p *pump) do(ctx context.Context, change func(context.Context) error) error {
	reply := make(chan error, 1)
	select {
	case p.requests <- request{context.WithoutCancel(ctx), change, reply}:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-reply:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// batch reads some records, waits until their entries are logged, and gives the records back. It returns how many there were.
func (p *pump) batch(ctx context.Context) (int, error) {
	var pending []namespace.Pending
	n := 0
	for ; n < batchMax; n++ {
		b := p.kernel.Next()
		if b == nil {
			break
		}
		fault.RecordTaken.Pass()
		entry, err := p.handle(ctx, b)
		if err != nil {
			return n, err
		}
		fault.RecordAppended.Pass()
		pending = append(pending, entry)
	}
	if n == 0 {
		return 0, nil
	}
	for _, entry := range pending {
		if err := entry.Logged(ctx); err != nil {
			return n, err
		}
		fault.RecordLogged.Pass()
		if err := p.tree.Mark(entry); err != nil {
			return n, err
		}
	}
	// Commit point: before this a crash makes the next agent read the records again, and its lists know the entries already;
	// after it they are nobody's concern any more.
	fault.RecordMarked.Pass()
	p.kernel.Commit()
	fault.RecordCommitted.Pass()
	return n, p.tree.Finish()
}

func (p *pump) handle(ctx context.Context, b []byte) (namespace.Pending, error) {
	record, err := event.Decode(b)
	if err != nil {
		p.log.Error("record not understood", zap.Error(err))
		return namespace.Pending{}, p.tree.Loss(ctx, event.LossUndecodableEvent)
	}
	switch r := record.(type) {
	case *event.File:
		return p.tree.File(ctx, r)
	case *event.Write:
		return namespace.Pending{}, p.tree.Write(ctx, r)
	case *event.Birth:
		return namespace.Pending{}, p.tree.Birth(r)
	case *event.Death:
		return namespace.Pending{}, p.tree.Death(r.NS)
	case *event.IDMaps:
		return namespace.Pending{}, p.tree.IDMaps(r)
	case *event.Move:
		p.tree.Move(r)
	}
	return namespace.Pending{}, nil
}

// watchKernelIMA stops trusting the kernel's digests of files whose changes its own IMA does not notice, once that has a policy.
func (p *pump) watchKernelIMA() error {
	n, err := kernelMeasurements()
	if err != nil {
		return nil // no IMA, or no securityfs: then there is no cache to be stale either
	}
	return p.kernel.DistrustCache(n > 1)
}
