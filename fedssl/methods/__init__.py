"""Self-supervised methods, one paper a file."""
