"""From files on a hospital's disk to patient-aware batches."""
