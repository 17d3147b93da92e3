"""A network, a task, a data set, a sampler, an objective and features of a user's own.

None of them is in the package: recipes name them by their dotted names, and the ordinary commands
do the rest (`test_toys.py`).
"""
