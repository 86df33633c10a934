"""Encoding, ranking, metrics and statistics."""
