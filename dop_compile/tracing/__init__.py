"""From a Hugging Face decoder to an fx graph: proxies with example values, and the decoder's inputs."""
