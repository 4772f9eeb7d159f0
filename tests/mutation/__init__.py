"""Mutants of not_hf: `make mutation`. One expression is changed at a time; a test should fail."""
