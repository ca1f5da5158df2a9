"""A drafting device and a partitioned target under a virtual clock: the real protocol code around toy compute."""
