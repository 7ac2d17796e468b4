"""Workers of one machine: how they are launched, supervised, recorded, and lent to requests."""
