package demo

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"strconv"
	"strings"
	"time"
)

// container is a server in a Docker container, through the docker command, so
// that contexts, DOCKER_HOST and credentials are the user's.
type container struct {
	primary
	image image
	id    string // the container's name

	created bool
	data    string // the data directory inside, known after the first start
}

func newContainer(p primary, image image, run string) *container {
	return &container{primary: p, image: image, id: run + "-" + p.name}
}

// docker runs the docker command and returns what it prints. Its error is what
// docker says.
func docker(ctx context.Context, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = env
	ownGroup(cmd)
	var out bytes.Buffer
	var stderr tail
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("docker %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

// start follows the contract of the official image's entrypoint: it creates
// the data directory at the first start, with a server that listens on its
// unix socket only.
func (c *container) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	first := !c.created
	if first {
		if err := c.create(ctx); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	if _, err := docker(ctx, nil, "start", c.id); err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	watch, stop := context.WithCancel(ctx)
	defer stop()
	exited := make(chan struct{})
	go func() {
		if _, err := docker(watch, nil, "wait", c.id); err == nil {
			close(exited)
		}
	}()
	if err := awaitConnections(ctx, c, exited); err != nil {
		return fmt.Errorf("%s: starting the server: %w; its log ends with:\n%s", c.name, err, c.log())
	}
	if !first {
		return nil
	}
	return once(ctx, c, func(db *session) error { return c.allowReplication(ctx, db) })
}

func (c *container) create(ctx context.Context) error {
	// Not ended by ctx: who interrupts this command does not know whether there
	// will be a container.
	c.created = true
	initdb := "--no-sync --encoding=UTF8 --locale=C --wal-segsize=" + strconv.Itoa(int(c.size)>>20)
	if c.image.major >= 16 { // it has -c: do not fill the first segment with zeros
		initdb += " -c wal_init_zero=off"
	}
	args := []string{
		"create", "--name", c.id, "--label", "walfleet.demo",
		"-p", fmt.Sprintf("127.0.0.1:%d:5432", c.port), "--shm-size", "256m",
		"-e", "POSTGRES_PASSWORD", "-e", "LC_ALL=C", "-e", "TZ=UTC",
		"-e", "POSTGRES_INITDB_ARGS=" + initdb,
		c.image.name, "postgres",
	}
	_, err := docker(context.WithoutCancel(ctx), append(c.environment(), "POSTGRES_PASSWORD="+c.password), append(args, c.flags()...)...)
	return err
}

// allowReplication adds the line that "host all" of the entrypoint does not
// cover. The method md5 takes what the password is stored as, SCRAM or md5.
func (c *container) allowReplication(ctx context.Context, db *session) error {
	hba, err := db.value(ctx, "SHOW hba_file")
	if err != nil {
		return err
	}
	if c.data, err = db.value(ctx, "SHOW data_directory"); err != nil {
		return err
	}
	const appendLine = `echo "host replication all all md5" >> "$1"`
	if _, err := docker(ctx, nil, "exec", c.id, "sh", "-c", appendLine, "sh", hba); err != nil {
		return err
	}
	_, err = db.query(ctx, "SELECT pg_reload_conf()")
	return err
}

func (c *container) log() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "docker", "logs", "--tail", "10", c.id).CombinedOutput()
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(out))
}

// kill ends the container's first process, the postmaster, with SIGKILL; the
// kernel then kills the others of its PID namespace.
func (c *container) kill(ctx context.Context) error {
	if _, err := docker(ctx, nil, "kill", c.id); err != nil {
		return err
	}
	_, err := docker(ctx, nil, "wait", c.id)
	return err
}

// stop is PostgreSQL's immediate shutdown.
func (c *container) stop(ctx context.Context) error {
	if _, err := docker(ctx, nil, "kill", "--signal", "QUIT", c.id); err != nil {
		return err
	}
	_, err := docker(ctx, nil, "wait", c.id)
	return err
}

func (c *container) remove() error {
	if !c.created {
		return nil
	}
	c.created = false
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := docker(ctx, nil, "rm", "--force", "--volumes", c.id)
	return err
}

func (c *container) psql(ctx context.Context) *exec.Cmd {
	args := append([]string{"exec", "-i", "-e", "PGPASSWORD", "-e", "PGAPPNAME", c.id, "psql"}, psqlArgs(5432)...)
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = c.environment()
	return cmd
}

// openWAL streams the file out of the container, running or not.
func (c *container) openWAL(ctx context.Context, name string) (io.ReadCloser, error) {
	cmd := exec.CommandContext(ctx, "docker", "cp", c.id+":"+path.Join(c.data, "pg_wal", name), "-")
	ownGroup(cmd)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	f := &copied{cmd: cmd}
	cmd.Stderr = &f.stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	archive := tar.NewReader(out)
	if _, err := archive.Next(); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("docker cp: %w", errors.Join(err, errors.New(strings.TrimSpace(f.stderr.String()))))
	}
	f.Reader = archive
	return f, nil
}

// copied is a file that "docker cp" writes into a pipe.
type copied struct {
	io.Reader
	cmd    *exec.Cmd
	stderr tail
}

// Close may come before the end of the file; what docker says then means
// nothing.
func (f *copied) Close() error {
	_ = f.cmd.Process.Kill()
	_ = f.cmd.Wait()
	return nil
}
