"""Small vision-language models that read handwritten digits: data, training, checkpoints."""
