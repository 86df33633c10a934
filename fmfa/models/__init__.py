"""The two systems: two-stream CLIP (IRRA, FMFA) and the single network IVT."""
