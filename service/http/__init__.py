"""The HTTP layer: it reads requests and writes answers, and decides nothing."""
