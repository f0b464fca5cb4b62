"""A whole federation on one machine, through the real ServerApp and ClientApp."""
