"""Device code, its binaries, and what loads and launches them. Importing it touches no driver: that waits for the first call on a GPU."""
