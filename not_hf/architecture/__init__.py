"""Native models: where their layers are, how they are spliced, and how two of them differ."""
