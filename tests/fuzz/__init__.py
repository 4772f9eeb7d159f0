"""Hostile files by the thousand: `make fuzz`. Each must end in success, a `ValueError` or an `OSError`."""
