package pgtest

import (
	"fmt"
	"net"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
)

// SocketPair returns both ends of a TCP connection on the loopback interface, which are closed when t ends.
func SocketPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	return client, server
}

// BeginStream serves a client that connects and asks for a stream at once, and returns when it streams. From then on the
// caller reads and writes the bytes of messages on c: for measurements, which a Server would disturb.
func BeginStream(c net.Conn) error {
	be := pgproto3.NewBackend(c, c)
	if _, err := be.ReceiveStartupMessage(); err != nil {
		return err
	}
	be.Send(&pgproto3.AuthenticationOk{})
	be.Send(&pgproto3.ParameterStatus{Name: "server_version", Value: "17.2"})
	be.Send(&pgproto3.BackendKeyData{ProcessID: 1, SecretKey: []byte{0, 0, 0, 1}})
	be.Send(ready)
	if err := be.Flush(); err != nil {
		return err
	}
	msg, err := be.Receive()
	if err != nil {
		return err
	}
	if _, ok := msg.(*pgproto3.Query); !ok {
		return fmt.Errorf("pgtest: %T, not START_REPLICATION", msg)
	}
	be.Send(&pgproto3.CopyBothResponse{})
	return be.Flush()
}
