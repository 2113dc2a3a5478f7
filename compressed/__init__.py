"""Read, check, count and execute a compressed network; start with `checkpoints` and `exact_network`."""
