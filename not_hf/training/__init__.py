"""Training organs."""
