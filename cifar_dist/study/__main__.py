"""``python -m cifar_dist.study``."""

from cifar_dist.distributed.ending import run_main
from cifar_dist.study.runner import main

if __name__ == "__main__":
    run_main(main)
