"""Memory for large arrays: given out in blocks, shared with the workers of this machine."""
