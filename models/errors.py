"""Errors about data sets and devices; for checkpoints, see `files.checkpoint_errors`. Needs no torch."""


class DataError(Exception):
    """A data set cannot be used; the message names the folder or file and what is wrong with it."""


class DeviceError(Exception):
    """A device cannot be used; the message names it and says why."""
