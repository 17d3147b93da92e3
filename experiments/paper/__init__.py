"""One recipe for each table and figure of the DiT paper, its published figures beside the cells."""
