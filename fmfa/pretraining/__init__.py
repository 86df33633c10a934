"""Pre-training on image-caption pairs: the methods, the pairs that they see and their loop."""
