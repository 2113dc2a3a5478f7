"""Train a sparse network: the stages (main.py), their loop and state, penalties, teachers and recipes."""
