"""Conversion of plain vision transformers to SuperViTs, without training."""
