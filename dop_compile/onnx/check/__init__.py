"""What an exported directory must be: valid, and the same as the PyTorch model."""
