"""Organs in a model."""
