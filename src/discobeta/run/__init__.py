"""One run: training, checkpoints, evaluation, how it is read again; and what runs will take: time and memory."""
