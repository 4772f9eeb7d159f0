"""Files of a checkpoint, here and on the Hub."""
