"""Processes that hold servers: one, several behind a port, replicas of Ray."""
