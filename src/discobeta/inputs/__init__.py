"""What the runs of a study share and are made of: base, world, reference pass, downloads."""
