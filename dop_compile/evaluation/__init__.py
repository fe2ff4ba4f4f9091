"""Methods compared on one model and one set of samples: accuracy, FLOPs, memory and times."""
