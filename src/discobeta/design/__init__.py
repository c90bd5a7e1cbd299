"""What is to be run: ideas and arms, stages, run and study configs, costs. Nothing here needs torch."""
