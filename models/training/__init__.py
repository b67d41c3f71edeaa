"""The paper's training: what a step learns from, the loop around it, and what it keeps."""
