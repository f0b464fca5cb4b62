"""What a consortium and a hospital run: identities, kits, gate, agent, and what watches them."""
