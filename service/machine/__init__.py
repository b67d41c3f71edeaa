"""What the machine looks like at this moment."""
