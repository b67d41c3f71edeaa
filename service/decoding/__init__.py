"""Untrusted bytes to images, on threads of their own."""
