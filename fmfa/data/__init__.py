"""Data sets as tables, and their pictures and captions as batches."""
