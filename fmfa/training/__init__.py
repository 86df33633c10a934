"""Training one system."""
