"""What processes tell each other of a step: a flag is set if it is on some process, and follows from no other."""

import itertools

import pytest
import torch

from cifar_dist.distributed.control import FlagReduction, StepFlags
from cifar_dist.distributed.group import start
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
WORDS = ("nonfinite", "stop", "save", "writing", "lost")
CASES = [*itertools.product((False, True), repeat=len(WORDS))]


def agreed(said, speaker):
    """The flags, and whether the step is refused, where `speaker` alone says anything."""
    accelerator = start("fp32")
    if accelerator.process_index != speaker:
        said = dict.fromkeys(WORDS, False)
    own = StepFlags(**{word: said[word] for word in WORDS[1:]})
    reduction = FlagReduction(accelerator, torch.tensor(said["nonfinite"]), own)
    return reduction.result(), bool(reduction.refused > 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_hears_what_one_says(processes):
    def work():
        return [agreed(dict(zip(WORDS, case, strict=True)), processes - 1) for case in CASES]

    for heard in Ranks(work, processes).check().results:
        for case, (flags, refused) in zip(CASES, heard, strict=True):
            said = dict(zip(WORDS, case, strict=True))
            assert refused == (said["nonfinite"] or said["lost"])
            assert flags == StepFlags(refused, *(said[word] for word in WORDS[1:]))
