"""Read, check, count and execute a compressed network; `checkpoints` and `exact_network` are where to begin."""
