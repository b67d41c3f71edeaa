"""The wire: requests in, answers out; nothing is decided here."""
