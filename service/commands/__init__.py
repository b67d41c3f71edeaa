"""The commands, one module each: what a command is told, and what it does."""
