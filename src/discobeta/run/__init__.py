"""One run: training, checkpoints, evaluation, how it is read again; and what it will take: operations and memory."""
