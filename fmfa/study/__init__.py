"""The study: its definition, its results, and what they say."""
