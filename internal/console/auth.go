package console

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/bcrypt"
)

const (
	// doorQueue is how many may wait for their password to be compared.
	doorQueue = 16
	// doorWait bounds how long they do.
	doorWait = 10 * time.Second
	// doorRest is how long nobody's is compared after a wrong one, as a multiple of the time that
	// took: guessing keeps a quarter of one processor busy at most.
	doorRest = 3
)

// A door lets in who knows the user and the password. It compares one password at a time,
// since that is expensive on purpose, and remembers the right one, not as such.
type door struct {
	user, hash []byte
	key        [sha256.Size]byte                 // of this process
	known      atomic.Pointer[[sha256.Size]byte] // of who was let in
	queue      chan struct{}                     // has one for each who waits or is compared
	turn       chan struct{}                     // has one while one is compared, and for the rest
	compare    func(hash, password []byte) error
}

func newDoor(user, hash string) *door {
	d := &door{
		user: []byte(user), hash: []byte(hash),
		queue: make(chan struct{}, doorQueue), turn: make(chan struct{}, 1),
		compare: bcrypt.CompareHashAndPassword,
	}
	_, _ = rand.Read(d.key[:]) // never fails
	return d
}

// refuse is why a request is not let in, or nil.
func (d *door) refuse(r *http.Request) *refusal {
	unknown := &refusal{http.StatusUnauthorized, "user and password are needed here", `WWW-Authenticate: Basic realm="walfleet", charset="UTF-8"`}
	busy := &refusal{http.StatusTooManyRequests, "too many passwords are being compared", "Retry-After: 10"}
	user, password, ok := r.BasicAuth()
	if !ok {
		return unknown
	}
	id := d.identify(user, password)
	if d.knows(id) {
		return nil
	}
	select {
	case d.queue <- struct{}{}:
		defer func() { <-d.queue }()
	default:
		return busy
	}
	wait := time.NewTimer(doorWait)
	defer wait.Stop()
	select {
	case d.turn <- struct{}{}:
	case <-wait.C:
		return busy
	case <-r.Context().Done():
		return busy
	}
	leave := func() { <-d.turn }
	if d.knows(id) { // by now
		leave()
		return nil
	}
	began := time.Now()
	right := d.compare(d.hash, []byte(password)) == nil
	// Whoever has another name is compared all the same: the time must not tell.
	if subtle.ConstantTimeCompare([]byte(user), d.user)&subtle.ConstantTimeEq(b2i(right), 1) != 1 {
		time.AfterFunc(doorRest*time.Since(began), leave)
		return unknown
	}
	d.known.Store(&id)
	leave()
	return nil
}

func b2i(b bool) int32 {
	if b {
		return 1
	}
	return 0
}

// identify is what is remembered of a user and a password. Neither can be found out from it.
func (d *door) identify(user, password string) (id [sha256.Size]byte) {
	mac := hmac.New(sha256.New, d.key[:])
	_ = binary.Write(mac, binary.BigEndian, uint64(len(user))) // never fails
	mac.Write([]byte(user))
	mac.Write([]byte(password))
	return [sha256.Size]byte(mac.Sum(nil))
}

func (d *door) knows(id [sha256.Size]byte) bool {
	known := d.known.Load()
	return known != nil && hmac.Equal(known[:], id[:])
}
