"""State that outlives a step: checkpoints, state_dict(), elastic snapshots, copies."""
