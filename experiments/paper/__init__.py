"""One recipe for each table and figure of the DiT paper, with its published figures."""
