"""Programs we compare with. Each runs in an environment of its own (`make bench-peers`), never in ours."""
