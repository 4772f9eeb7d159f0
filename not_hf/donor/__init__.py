"""An organ on its own."""
