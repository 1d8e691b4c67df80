// Writes a database as the older service and its server leave one: main DIRECTORY < lines of {"name": ..., "value": base64}
// One half is in tables, the other only in the log, as after a kill.
package main

import (
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"

	"github.com/cockroachdb/pebble"
)

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	db, err := pebble.Open(os.Args[1], &pebble.Options{})
	must(err)
	for read, count := json.NewDecoder(os.Stdin), 0; ; count++ {
		var entry struct {
			Name  string `json:"name"`
			Value []byte `json:"value"`
		}
		if err := read.Decode(&entry); errors.Is(err, io.EOF) {
			return // and not closed
		} else {
			must(err)
		}
		must(db.Set([]byte(entry.Name), entry.Value, pebble.Sync))
		if count == 2 {
			must(db.Flush())
		}
	}
}
