"""API keys and the file that says what each key allows, and the TLS certificate."""
