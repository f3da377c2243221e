"""One call's life, from its head to its last byte, without I/O."""
