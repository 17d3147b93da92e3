"""The cells of a study, their status, and the published figures that belong to them."""
