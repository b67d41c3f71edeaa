"""An open-loop load generator: requests go out at their own times, whatever becomes of those before them."""
