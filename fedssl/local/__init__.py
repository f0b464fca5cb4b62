"""What a site does against drift while it trains by itself, one paper a file."""
