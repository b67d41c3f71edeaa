"""Keys: what comes with a request, and the file that says what each of them allows."""
