"""Device code, its binaries, and what loads and launches them. Nothing here is imported before a call asks for a GPU."""
