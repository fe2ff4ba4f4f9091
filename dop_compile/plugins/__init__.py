"""Ways in which other programs use compiled models."""
