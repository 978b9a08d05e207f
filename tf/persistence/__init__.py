"""State that outlives a step: checkpoints, Keras files, elastic snapshots, copies."""
