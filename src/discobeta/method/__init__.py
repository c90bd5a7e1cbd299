"""What the project exists for: heads, signals, stages, and what a stage is given. The losses are `discobeta.losses`."""
