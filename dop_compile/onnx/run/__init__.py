"""Runs an exported directory."""
