"""What follows from a history alone: kept for a user from one request to the next."""
