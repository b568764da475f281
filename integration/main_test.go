// Package integration tests walfleet against real PostgreSQL servers in containers.
//
// The tests ask for the official images (postgres:17), or for what
// TESTCONTAINERS_HUB_IMAGE_NAME_PREFIX makes of them: "make test" sets it to the images of
// scripts/images.sh. WALFLEET_TEST_IMAGE names one more image (PolarDB's, say) that the tests of every
// version run against; it must follow the official image's contract: POSTGRES_PASSWORD,
// POSTGRES_INITDB_ARGS, /docker-entrypoint-initdb.d, and "postgres" with options as the command.
//
// Servers keep all their WAL, and what walfleet archived is compared with it byte for byte.
package integration

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"testing"
	"time"

	"github.com/testcontainers/testcontainers-go"
	"github.com/testcontainers/testcontainers-go/log"
)

func TestMain(m *testing.M) {
	log.SetDefault(log.NewNoopLogger())
	// testcontainers-go would put the prefix before every image, that of the environment included.
	imagePrefix = os.Getenv(prefixVariable)
	os.Unsetenv(prefixVariable)
	if err := engineAnswers(); err != nil {
		fmt.Fprintf(os.Stderr, "integration: these tests need a Docker engine, and none answers: %v\n"+
			"\"make test\" sets up what they need; \"make test-unit\" runs all tests that need no containers\n", err)
		os.Exit(1)
	}
	dir, err := os.MkdirTemp("", "walfleet-integration-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		os.Exit(1)
	}
	walfleet.path = filepath.Join(dir, "walfleet")
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func engineAnswers() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	client, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return err
	}
	return client.Close()
}

const (
	defaultImage = "postgres:17"

	prefixVariable = "TESTCONTAINERS_HUB_IMAGE_NAME_PREFIX"
	extraVariable  = "WALFLEET_TEST_IMAGE"
)

// imagePrefix stands before the names of official images.
var imagePrefix string

// images are those of the versions that are supported, and the one of the environment.
func images() []string {
	list := []string{"postgres:13", "postgres:15", "postgres:17", "postgres:18"}
	if extra := os.Getenv(extraVariable); extra != "" {
		list = append(list, extra)
	}
	return list
}

// imageName is what Docker knows an image as.
func imageName(image string) string {
	if image == os.Getenv(extraVariable) {
		return image
	}
	return path.Join(imagePrefix, image)
}

// await polls until the condition holds, and fails the test after the limit. The condition returns what
// it saw, for the failure's message.
func await(t testing.TB, limit time.Duration, what string, condition func() (ok bool, saw string)) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		ok, saw := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s; last seen: %s", limit, what, saw)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// patience is the limit for what usually takes a second or two, on a machine that has other things to do: a receiver
// pauses for up to half a minute before it tries again.
const patience = 3 * time.Minute
