package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
)

// object is a JSON object. Its members keep their order, and the values their text, down to each digit of a number.
type object struct {
	members []member
}

type member struct {
	key   string
	value json.RawMessage
}

// errNoObject means that some other JSON value stands there.
var errNoObject = errors.New("want an object")

// parseObject reads one object and nothing behind it. A name twice is refused: programs differ in which of them counts.
func parseObject(text []byte) (*object, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil {
		return nil, describe(err)
	} else if t != json.Delim('{') {
		return nil, errNoObject
	}
	o := &object{}
	seen := make(map[string]bool)
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, describe(err)
		}
		m := member{key: t.(string)} // the decoder lets nothing else stand here
		if seen[m.key] {
			return nil, fmt.Errorf("%q is there twice", m.key)
		}
		seen[m.key] = true
		if err := d.Decode(&m.value); err != nil {
			return nil, describe(err)
		}
		o.members = append(o.members, m)
	}
	if _, err := d.Token(); err != nil {
		return nil, describe(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the object")
	}
	return o, nil
}

// describe calls the end in the middle of a text by its name.
func describe(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// get returns a member's value. One that is null is not there.
func (o *object) get(key string) (json.RawMessage, bool) {
	for _, m := range o.members {
		if m.key == key && !bytes.Equal(m.value, []byte("null")) {
			return m.value, true
		}
	}
	return nil, false
}

// set puts a value where the member stands, or at the end.
func (o *object) set(key string, value json.RawMessage) {
	i := slices.IndexFunc(o.members, func(m member) bool { return m.key == key })
	if i < 0 {
		o.members = append(o.members, member{key, value})
		return
	}
	o.members[i].value = value
}

func (o *object) remove(key string) {
	o.members = slices.DeleteFunc(o.members, func(m member) bool { return m.key == key })
}

func (o *object) encode() json.RawMessage {
	out := []byte{'{'}
	for i, m := range o.members {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(append(out, encode(m.key)...), ':')
		out = append(out, m.value...)
	}
	return append(out, '}')
}

// encode writes strings, numbers and structs of them, none of which can fail, and leaves <, > and & as they are.
func encode(v any) json.RawMessage {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(fmt.Sprintf("oci: encode %T: %v", v, err))
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n"))
}

// change edits the object at the end of the path keys. What is missing on the way is made if the edit leaves something in it.
func (o *object) change(path string, keys []string, edit func(path string, o *object) error) error {
	if len(keys) == 0 {
		return edit(path, o)
	}
	at, child := join(path, keys[0]), &object{}
	raw, ok := o.get(keys[0])
	if ok {
		var err error
		if child, err = parseObject(raw); err != nil {
			return wrong(at, raw, err.Error())
		}
	}
	if err := child.change(at, keys[1:], edit); err != nil {
		return err
	}
	if ok || len(child.members) > 0 {
		o.set(keys[0], child.encode())
	}
	return nil
}

// changeList edits a list member; a missing one is empty, and stays missing if nothing is put into it.
func (o *object) changeList(path, key string, edit func(path string, list []json.RawMessage) ([]json.RawMessage, error)) error {
	at := join(path, key)
	var list []json.RawMessage
	raw, ok := o.get(key)
	if ok {
		if err := json.Unmarshal(raw, &list); err != nil {
			return wrong(at, raw, "want a list")
		}
	}
	list, err := edit(at, list)
	if err != nil || !ok && len(list) == 0 {
		return err
	}
	o.set(key, encodeList(list))
	return nil
}

func encodeList(list []json.RawMessage) json.RawMessage {
	return slices.Concat(json.RawMessage{'['}, bytes.Join(rawBytes(list), []byte{','}), json.RawMessage{']'})
}

func rawBytes(list []json.RawMessage) [][]byte {
	out := make([][]byte, len(list))
	for i, v := range list {
		out[i] = v
	}
	return out
}

// decode reads a value, or says which member of it is of the wrong type. Only a value that has no members is shown.
func decode(field string, raw json.RawMessage, v any, reason string) error {
	if err := json.Unmarshal(raw, v); err != nil {
		var typed *json.UnmarshalTypeError
		if errors.As(err, &typed) && typed.Field != "" {
			return &FieldError{Field: join(field, typed.Field), Reason: "want " + kindName(typed.Type.Kind())}
		}
		return wrong(field, raw, reason)
	}
	return nil
}

// kindName says in JSON's words what a Go value is read from.
func kindName(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "a list"
	case reflect.Uint32, reflect.Int:
		return "a number that is not negative"
	}
	return "an object"
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}
