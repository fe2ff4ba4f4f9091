"""What each command takes, and where what it does is: told without importing torch."""
