"""How a consortium and a hospital stand, read from files."""
