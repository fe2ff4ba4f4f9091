"""One forward call of a compiled decoder: groups and reduction, slots, masks, the program's pieces, and the cache."""
