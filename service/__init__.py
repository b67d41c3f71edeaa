"""The server: adaptive image classification over HTTP with one shared-weight SuperViT."""
