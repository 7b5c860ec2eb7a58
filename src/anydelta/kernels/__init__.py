"""Device code, one folder per backend."""
