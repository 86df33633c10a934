"""The losses of both systems: pure functions of tensors."""
