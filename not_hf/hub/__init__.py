"""Files of donors and bases, in folders and on the Hub."""
