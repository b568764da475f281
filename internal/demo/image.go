package demo

import (
	"context"
	"fmt"
	"os/exec"
	"strings"

	"github.com/walfleet/walfleet/internal/postgres"
)

// image is a container image with a PostgreSQL server.
type image struct {
	name    string // empty: none
	version string
	major   int
}

// findImage chooses the container image: the one asked for, else the first
// that is present, else the official one, which is then pulled.
func findImage(ctx context.Context, asked string) (string, error) {
	_, err := exec.LookPath("docker")
	if err == nil {
		_, err = docker(ctx, nil, "version", "--format", "{{.Server.Version}}")
	}
	switch {
	case err != nil && asked != "":
		return "", fmt.Errorf("image %s: %w", asked, err)
	case err != nil:
		return "", fmt.Errorf("neither PostgreSQL %d or later (postgres, %s in one directory) nor Docker is usable here: %w; "+
			"install one of them, for example with: apt install postgresql", postgres.OldestMajor, strings.Join(programs, ", "), err)
	case asked != "":
		return asked, nil
	}
	images := []string{"localhost/walfleet/postgres:17", "postgres:17"}
	for _, image := range images {
		if imagePresent(ctx, image) {
			return image, nil
		}
	}
	return images[len(images)-1], nil
}

func imagePresent(ctx context.Context, image string) bool {
	_, err := docker(ctx, nil, "image", "inspect", "--format", "{{.Id}}", image)
	return err == nil
}

// inspectImage asks the server in the image for its version.
func inspectImage(ctx context.Context, name string) (image, error) {
	out, err := docker(ctx, nil, "run", "--rm", name, "postgres", "--version")
	if err != nil {
		return image{}, fmt.Errorf("image %s: %w", name, err)
	}
	i := image{name: name}
	if i.version, i.major = postgres.ParseVersion(out); i.major < postgres.OldestMajor {
		return image{}, fmt.Errorf("image %s: PostgreSQL %d or later is needed, \"postgres --version\" says %q", name, postgres.OldestMajor, out)
	}
	return i, nil
}
