"""Machines that are not here: chips, topologies, compiled programs, and what a run would cost."""
