"""States of users."""
