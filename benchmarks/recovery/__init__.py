"""Campaigns that kill, damage and starve trainings; each is ``python -m benchmarks.recovery.NAME``."""

import os

# Before anything that reads them is imported, and for all processes that are started.
os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
