"""`dop-compile demo`: questions about a picture of digits, answered in full and pruned."""
