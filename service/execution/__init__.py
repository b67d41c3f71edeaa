"""Threads: what the scheduler decides is run here."""
