"""Decodes untrusted bytes to images, on its own threads."""
