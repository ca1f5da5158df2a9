"""What an event makes of the cluster's state: pure functions, by the noun that changes."""
