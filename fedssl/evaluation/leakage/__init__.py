"""What trained weights give away: who trained them, whom a prototype sits on, and where an image was made."""
