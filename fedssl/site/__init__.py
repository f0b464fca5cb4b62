"""What belongs to the hospital: its images, its optimiser state, its answer to each round."""
