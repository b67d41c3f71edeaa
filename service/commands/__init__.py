"""What each command of the shell does. Options and help need no torch; what runs imports what it needs."""
