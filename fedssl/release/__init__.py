"""The shared encoder in forms that other programs read."""
