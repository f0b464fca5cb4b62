"""How good is a frozen encoder with few labels, beside what, and how sure are we."""
