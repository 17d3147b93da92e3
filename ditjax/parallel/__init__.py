"""Device meshes and sharding rules: the only PartitionSpecs there are."""
