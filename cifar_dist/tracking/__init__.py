"""Where a training's numbers go."""
