"""The only door of the server: who may pass, and how a site greets it."""
