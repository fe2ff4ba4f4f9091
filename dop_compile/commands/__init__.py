"""What the commands of `dop-compile` do, and their options."""
