"""Settings from the environment, and the keys and certificates that they name."""
