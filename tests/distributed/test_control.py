"""What processes decide together about a step: each word is of whichever process says it, and of no other word."""

import itertools

import pytest
import torch

from cifar_dist.distributed.control import Agreement, Verdict, Wish
from cifar_dist.distributed.group import start
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
WORDS = ("bad", "stop", "save", "writing", "lost")
CASES = [*itertools.product((False, True), repeat=len(WORDS))]


def agreed(said, speaker):
    """The verdict, and whether the step is refused, where `speaker` alone says anything."""
    accelerator = start("fp32")
    if accelerator.process_index != speaker:
        said = dict.fromkeys(WORDS, False)
    wish = Wish(said["stop"], said["save"], said["writing"])
    agreement = Agreement(accelerator, torch.tensor(said["bad"]), wish, said["lost"])
    return agreement.verdict(), bool(agreement.refused > 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_hears_what_one_says(processes):
    def work():
        return [agreed(dict(zip(WORDS, case, strict=True)), processes - 1) for case in CASES]

    for heard in Ranks(work, processes).check().results:
        for case, (verdict, refused) in zip(CASES, heard, strict=True):
            said = dict(zip(WORDS, case, strict=True))
            assert refused == (said["bad"] or said["lost"])
            assert verdict == Verdict(**{**said, "bad": refused})
