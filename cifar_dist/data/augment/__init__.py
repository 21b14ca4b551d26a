"""Batched augmentation and preprocessing on the device: uint8 (B,S,S,3) in, normalised (B,3,T,T) out.

The randomness of a sample is a pure function of (seed, epoch, sample id), so its pixels do not depend on the batch,
the process or the step it falls into; mixing follows from the first sample of a pair.

The order is crop, flip, policy, colour jitter, normalise, cutout, random erasing, resize, mixing; a random resized crop
comes first and leaves nothing to resize. Normalising acts on
each pixel alone (affine) and resizing is a linear filter whose weights add up to 1, so these two commute; doing the
resize last, and the rest on the small image, costs least. Some places are fixed by convention: padding is black and the
policies work on bytes, so they come before normalising (as in torchvision and timm); cutout and erasing fill with the
mean, which is 0, and so come after it.
"""

from cifar_dist.data.augment.mixing import Mixing
from cifar_dist.data.augment.pipeline import Augment
from cifar_dist.data.augment.preprocess import Preprocess
from cifar_dist.data.augment.views import VIEWS, View

__all__ = ["VIEWS", "Augment", "Mixing", "Preprocess", "View"]
