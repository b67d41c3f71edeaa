"""An open-loop load generator: each request is sent when it is due, whether or not earlier ones have their answers."""
