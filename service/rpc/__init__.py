"""The gRPC transport, as `service.http` is that of HTTP: calls in, answers out; nothing is decided here."""
