"""Files that know nothing of learning: whole-or-nothing writes, npz, digests, leases, masking."""
