"""One run: training, checkpoints, evaluation, and how it is read again."""
