"""Engines that run batches on a device, and how long a batch takes on this machine."""
