"""Writes an exported directory."""
