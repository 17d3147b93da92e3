"""Closed-form costs of a network, and the laws fitted to a study."""
