"""Several organs, by name."""
