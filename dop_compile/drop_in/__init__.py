"""The drop-in model: a copy that shares the original's weights and runs its decoder as compiled."""
