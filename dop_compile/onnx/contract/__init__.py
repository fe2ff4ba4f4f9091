"""What an exported directory holds: the contract between those who write it and those who run it."""
