"""What a compiled model computes and costs: per layer, as tables and pictures."""
