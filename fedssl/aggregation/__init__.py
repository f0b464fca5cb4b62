"""How the server combines the sites' updates, one paper a file."""
