"""All that is known of transformers: its names, its spellings, and what of it is private or rebuilt."""
