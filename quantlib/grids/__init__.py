"""Number grids: how a real weight becomes an integer code, and which scales make that cost least."""
