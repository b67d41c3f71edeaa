"""The shell commands. Options and help need no torch; each command imports what it needs once it runs."""
