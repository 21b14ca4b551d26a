"""Train and fine-tune image classifiers on CIFAR the same way on any number of processes."""
