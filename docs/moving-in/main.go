// Writes the older service's keys as lines of JSON: main KMS_DB [SERVER_DB] > export.jsonl
// Neither service may be running. Build it among the older service's sources, with its version of Pebble.
package main

import (
	"bufio"
	"encoding/json"
	"log"
	"os"
	"strings"

	"github.com/cockroachdb/pebble"
)

type line struct {
	KeyID  string `json:"key_id"`
	DEK    []byte `json:"dek"`
	Meta   []byte `json:"dekmeta,omitempty"`
	Thread string `json:"thread_id,omitempty"`
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// each calls do with every key of a database that begins with prefix, without it.
func each(path, prefix string, do func(db *pebble.DB, rest string, value []byte)) {
	db, err := pebble.Open(path, &pebble.Options{ReadOnly: true})
	must(err)
	end := []byte(prefix)
	end[len(end)-1]++
	found, err := db.NewIter(&pebble.IterOptions{LowerBound: []byte(prefix), UpperBound: end})
	must(err)
	for ok := found.First(); ok; ok = found.Next() {
		do(db, strings.TrimPrefix(string(found.Key()), prefix), found.Value())
	}
	must(found.Error())
	must(found.Close())
	must(db.Close())
}

func main() {
	threads, keys := map[string]string{}, 0
	if len(os.Args) > 2 {
		each(os.Args[2], "thread:", func(_ *pebble.DB, rest string, value []byte) {
			var meta struct {
				KMS struct {
					KeyID string `json:"key_id"`
				} `json:"kms"`
			}
			if id, ok := strings.CutSuffix(rest, ":meta"); ok && json.Unmarshal(value, &meta) == nil {
				threads[meta.KMS.KeyID] = id
			}
		})
	}
	out := bufio.NewWriter(os.Stdout)
	write := json.NewEncoder(out)
	each(os.Args[1], "dek:", func(db *pebble.DB, id string, value []byte) {
		key := line{KeyID: id, DEK: value, Thread: threads[id]}
		if meta, closer, err := db.Get([]byte("dekmeta:" + id)); err == nil {
			key.Meta = append(key.Meta, meta...)
			must(closer.Close())
		} else if err != pebble.ErrNotFound {
			log.Fatal(err)
		}
		must(write.Encode(key))
		keys++
	})
	must(write.Encode(map[string]int{"keys": keys}))
	must(out.Flush())
}
