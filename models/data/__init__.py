"""Folders of images, and how an image becomes a tensor."""
