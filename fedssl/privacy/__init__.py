"""Differential privacy for patients: what a step releases, what it costs, and how it is computed."""
