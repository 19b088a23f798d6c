"""Safe decoding of pictures and video, and the one resize rule.

Needs Pillow and NumPy; PyAV only when a video is opened.
"""

from __future__ import annotations

from mmalign.media.decode import (
    COLOUR_POLICY,
    DEFAULT,
    PLAIN,
    Colours,
    Decoded,
    Limits,
    claimed_size,
    decode_image,
    open_image,
    read_bytes,
    stored_to_rgb,
)
from mmalign.media.errors import IMAGE_REASONS, VIDEO_REASONS, MediaError
from mmalign.media.perturbations import PERTURBATIONS, RATES, Perturbed, distinct_rates, perturb, perturbed
from mmalign.media.resize import RESIZE_RULE, Crop, cover_geometry, resize_crop, to_array
from mmalign.media.samplers import Sampler
from mmalign.media.sniff import Kind, image_kind
from mmalign.media.torchcodec import DECODERS as VIDEO_DECODERS
from mmalign.media.torchcodec import require as require_decoder
from mmalign.media.video import Frames, VideoFacts, all_frames, decode_video, inspect_video, video_fields

__all__ = [
    "COLOUR_POLICY",
    "DEFAULT",
    "IMAGE_REASONS",
    "PERTURBATIONS",
    "PLAIN",
    "RATES",
    "RESIZE_RULE",
    "VIDEO_DECODERS",
    "VIDEO_REASONS",
    "Colours",
    "Crop",
    "Decoded",
    "Frames",
    "Kind",
    "Limits",
    "MediaError",
    "Perturbed",
    "Sampler",
    "VideoFacts",
    "all_frames",
    "claimed_size",
    "cover_geometry",
    "decode_image",
    "decode_video",
    "distinct_rates",
    "image_kind",
    "inspect_video",
    "open_image",
    "perturb",
    "perturbed",
    "read_bytes",
    "require_decoder",
    "resize_crop",
    "stored_to_rgb",
    "to_array",
    "video_fields",
]
