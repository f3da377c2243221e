"""The user's cache folder: which `up` runs on this machine, and which files can be removed."""
