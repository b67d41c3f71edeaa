"""What runs a batch on a device, and what that takes here."""
