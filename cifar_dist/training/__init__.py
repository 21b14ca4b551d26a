"""From a step number to trained weights: batches, the step, exact passes, and what is found out before."""
