"""Ways to the same sum of clipped gradients, one a file: which is fastest depends on the machine."""
