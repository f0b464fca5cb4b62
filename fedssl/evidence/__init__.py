"""A study: what pretraining together is worth, by a protocol that is fixed before anything is trained."""
