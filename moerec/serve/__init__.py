"""A finished run that answers: requests, recommendations, profiles of users and their store."""
