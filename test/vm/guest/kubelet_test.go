//go:build vm

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	containerdPrograms = "/payload/containerd"
	tenantImage        = "localhost/tenant:1"
	// criRuncRoot is where containerd's shim has runc keep the state of Kubernetes' containers.
	criRuncRoot = "/run/containerd/runc/k8s.io"
	criPatience = 3 * time.Minute
)

// kubelet asks a containerd of its own for pods, over the Container Runtime Interface as Kubernetes' kubelet does. The pods have the
// host's network.
type kubelet struct {
	t       *testing.T
	dir     string // of containerd: programs, data, sockets, log
	cmd     *exec.Cmd
	cri     *http.Client
	pods    map[string]string // their ids, by name
	logFrom int               // what containerd had said when what is awaited had not happened yet
}

// newKubelet puts down what containerd needs. What it leaves is gone when the test ends.
func newKubelet(t *testing.T) *kubelet {
	t.Helper()
	k := &kubelet{t: t, dir: tempDir(t, "/srv"), pods: map[string]string{}}
	sh(t, fmt.Sprintf("mkdir %[1]s/bin && cp %[2]s/* %[1]s/bin/ && touch /etc/hosts /etc/resolv.conf", k.dir, containerdPrograms))
	config := fmt.Sprintf(`version = 3
root = "%[1]s/root"
state = "%[1]s/state"
[grpc]
address = "%[1]s/sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "%[2]s"
[plugins."io.containerd.cri.v1.runtime"]
disable_apparmor = true
[plugins."io.containerd.nri.v1.nri"]
socket_path = "%[3]s"
plugin_path = "%[1]s/plugins"
plugin_config_path = "%[1]s/plugins"
plugin_registration_timeout = "1m"
plugin_request_timeout = "1m"
[plugins."io.containerd.nri.v1.nri".default_validator]
enable = true
`, k.dir, tenantImage, k.nri())
	if err := os.WriteFile(k.dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	k.cri = &http.Client{Timeout: criPatience, Transport: &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", k.dir+"/sock")
	}}}
	t.Cleanup(func() {
		if k.cmd != nil {
			k.removeAll()
			k.stop()
		}
		if log, err := os.ReadFile(k.dir + "/log"); t.Failed() && err == nil {
			t.Logf("containerd said: %s", tail(string(log), 6000))
		}
	})
	return k
}

// nri is the path of the socket for plugins.
func (k *kubelet) nri() string { return k.dir + "/nri.sock" }

// said returns what containerd has said since the last time that something was awaited.
func (k *kubelet) said() string {
	log, err := os.ReadFile(k.dir + "/log")
	if err != nil {
		k.t.Fatal(err)
	}
	return string(log[k.logFrom:])
}

// await waits until something is so.
func (k *kubelet) await(what string, is func() bool) {
	k.t.Helper()
	for deadline := time.Now().Add(criPatience); !is(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			k.t.Fatalf("not after %v: %s", criPatience, what)
		}
	}
}

// awaitLog waits until containerd has said something.
func (k *kubelet) awaitLog(text string) {
	k.t.Helper()
	k.await("containerd says "+text, func() bool {
		at := strings.Index(k.said(), text)
		if at >= 0 {
			k.logFrom += at + len(text)
		}
		return at >= 0
	})
}

// connected waits until the agent is containerd's plugin; disconnected until it is no more.
func (k *kubelet) connected()    { k.t.Helper(); k.awaitLog("connected and synchronized") }
func (k *kubelet) disconnected() { k.t.Helper(); k.awaitLog(`plugin \"90-imans\" closed`) }

// start starts containerd, with what an earlier one left.
func (k *kubelet) start() {
	k.t.Helper()
	log, err := os.OpenFile(k.dir+"/log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		k.t.Fatal(err)
	}
	defer log.Close()
	k.cmd = exec.Command(k.dir+"/bin/containerd", "--config", k.dir+"/config.toml")
	k.cmd.Env = append(os.Environ(), "PATH="+k.dir+"/bin:"+os.Getenv("PATH"))
	k.cmd.Stdout, k.cmd.Stderr = log, log
	if err := k.cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	k.await("containerd answers", func() bool {
		_, err := k.call("RuntimeService/Status", message{})
		return err == nil
	})
}

// stop ends containerd; its containers go on.
func (k *kubelet) stop() {
	k.t.Helper()
	k.cmd.Process.Signal(syscall.SIGTERM)
	k.cmd.Wait()
	k.cri.CloseIdleConnections()
	k.cmd, k.logFrom = nil, k.logFrom+len(k.said())
}

// image makes a folder the image of all containers. The pod's own runs a static program, as it has no mounts.
func (k *kubelet) image(root string) {
	k.t.Helper()
	sh(k.t, fmt.Sprintf(`set -e
cp /bin/busybox %[1]s/ && mkdir %[2]s/image && cd %[2]s/image && tar -C %[1]s -cf layer.tar .
printf '{"architecture":"amd64","os":"linux","config":{"Entrypoint":["/busybox","sleep","100000"]},"rootfs":{"type":"layers","diff_ids":["sha256:%%s"]}}' \
	"$(sha256sum layer.tar | cut -d ' ' -f 1)" >config.json
printf '[{"Config":"config.json","RepoTags":["%[3]s"],"Layers":["layer.tar"]}]' >manifest.json
tar -cf ../image.tar manifest.json config.json layer.tar
%[2]s/bin/ctr --address %[2]s/sock --namespace k8s.io images import ../image.tar`, root, k.dir, tenantImage))
	k.await("the image is there", func() bool {
		answer, err := k.call("ImageService/ImageStatus", message{1: message{1: tenantImage}})
		return err == nil && bytes.Contains(answer, []byte(tenantImage))
	})
}

// pod starts a pod with one container.
func (k *kubelet) pod(name, namespace string, annotations map[string]string) *tenant {
	k.t.Helper()
	id, err := k.run(name, namespace, annotations)
	if err != nil {
		k.t.Fatalf("pod %s: %v", name, err)
	}
	var state struct{ Pid int }
	if err := json.Unmarshal([]byte(sh(k.t, "runc --root "+criRuncRoot+" state "+id)), &state); err != nil {
		k.t.Fatal(err)
	}
	return ready(k.t, &tenant{t: k.t, id: id, pid: state.Pid, exec: []string{"runc", "--root", criRuncRoot, "exec", id}, end: []string{"true"}})
}

// run starts a pod with one container, and returns the container's id.
func (k *kubelet) run(name, namespace string, annotations map[string]string) (string, error) {
	hostNetwork := message{1: 2} // NamespaceOption: network NODE
	sandbox := message{          // PodSandboxConfig: metadata, annotations, linux
		1: message{1: name, 2: "uid-" + name, 3: namespace}, 7: entries(annotations), 8: message{2: message{1: hostNetwork}},
	}
	answer, err := k.call("RuntimeService/RunPodSandbox", message{1: sandbox})
	if err != nil {
		return "", err
	}
	pod := firstField(answer)
	k.pods[name] = pod
	container := message{ // ContainerConfig: metadata, image, command, mounts, linux
		1: message{1: "main"}, 2: message{1: tenantImage}, 3: []any{"/bin/sh", "-c", tenantMain},
		7: message{1: "/usr", 2: "/usr", 3: 1}, 15: message{2: message{3: hostNetwork}},
	}
	answer, err = k.call("RuntimeService/CreateContainer", message{1: pod, 2: container, 3: sandbox})
	if err != nil {
		return "", err
	}
	id := firstField(answer)
	_, err = k.call("RuntimeService/StartContainer", message{1: id})
	return id, err
}

// remove stops and removes a pod with its container.
func (k *kubelet) remove(name string) {
	k.t.Helper()
	for _, method := range []string{"StopPodSandbox", "RemovePodSandbox"} {
		if _, err := k.call("RuntimeService/"+method, message{1: k.pods[name]}); err != nil {
			k.t.Errorf("%s %s: %v", method, name, err)
		}
	}
	delete(k.pods, name)
}

func (k *kubelet) removeAll() {
	k.t.Helper()
	for name := range k.pods {
		k.remove(name)
	}
}

// call is a gRPC call of one request and one answer.
func (k *kubelet) call(method string, request message) ([]byte, error) {
	body := request.encode()
	body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...) // not compressed
	r, err := http.NewRequest(http.MethodPost, "http://containerd/runtime.v1."+method, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/grpc")
	r.Header.Set("TE", "trailers")
	answer, err := k.cri.Do(r)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	body, err = io.ReadAll(answer.Body)
	if err != nil {
		return nil, err
	}
	status, text := answer.Trailer.Get("grpc-status"), answer.Trailer.Get("grpc-message")
	if status == "" {
		status, text = answer.Header.Get("grpc-status"), answer.Header.Get("grpc-message")
	}
	if status != "0" || len(body) < 5 {
		if plain, err := url.PathUnescape(text); err == nil {
			text = plain
		}
		return nil, errors.New("status " + status + ": " + text)
	}
	return body[5:], nil
}

// message is a message of the Container Runtime Interface (k8s.io/cri-api, runtime/v1/api.proto) by its fields' numbers. A value is a
// string, an int, a message, or several of these.
type message map[int]any

func (m message) encode() []byte {
	var out []byte
	for number, value := range m {
		values, several := value.([]any)
		if !several {
			values = []any{value}
		}
		for _, v := range values {
			if n, ok := v.(int); ok {
				out = binary.AppendUvarint(binary.AppendUvarint(out, uint64(number)<<3), uint64(n))
				continue
			}
			text, ok := v.(string)
			if !ok {
				text = string(v.(message).encode())
			}
			out = binary.AppendUvarint(binary.AppendUvarint(out, uint64(number)<<3|2), uint64(len(text)))
			out = append(out, text...)
		}
	}
	return out
}

// entries is a map as a message has it.
func entries(m map[string]string) []any {
	var out []any
	for name, value := range m {
		out = append(out, message{1: name, 2: value})
	}
	return out
}

// firstField returns the first field of an answer, a string.
func firstField(answer []byte) string {
	if len(answer) < 2 || answer[0] != 1<<3|2 {
		return ""
	}
	size, n := binary.Uvarint(answer[1:])
	if n <= 0 || uint64(len(answer)-1-n) < size {
		return ""
	}
	return string(answer[1+n : 1+n+int(size)])
}
