"""A Flower app for ``simulations.flower_benchmark``: sites that answer at once, fedssl's loop or Flower's FedAvg."""
