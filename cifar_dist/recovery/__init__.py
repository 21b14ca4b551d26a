"""What makes a run survive: checkpoints, signals, and the way back."""
