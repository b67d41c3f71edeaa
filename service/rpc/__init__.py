"""gRPC: calls in, answers out, as `service.http` does for HTTP; nothing is decided here."""
