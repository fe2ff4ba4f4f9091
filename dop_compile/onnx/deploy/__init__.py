"""An exported directory for servers and engines of others."""
