"""What reducers may know of the vision tower's work on a prompt."""
