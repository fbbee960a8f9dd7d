"""Published checkpoints: where each lies, what its bytes hash to, and the settings that its shapes do not tell."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from mt3_export.yourmt3_models import MODELS
from mt3_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class PublishedCheckpoint:
    """One file of a Hugging Face repository and how its network is to be run.

    `revision` is a commit where one is known; the content is pinned by `sha256` either way. `size` in bytes.
    `frontend`, `mel_norm` and `position_base` as in `FeatureSpec` and `ModelSpec`.
    """

    name: str
    repository: str
    repository_type: Literal["model", "space"]
    revision: str
    filename: str
    sha256: str
    size: int
    model: str
    num_heads: int
    max_length: int
    frontend: str
    mel_norm: bool
    position_base: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise CheckpointError(f"{self.name}: sha256 {self.sha256!r} is not 64 hex digits: correct the table")
        if self.size <= 0:
            raise CheckpointError(f"{self.name}: size {self.size} is not positive: correct the table")

    @property
    def local_name(self) -> str:
        """File name in a local folder; unlike `filename` it is different for every row."""
        return self.name + PurePosixPath(self.filename).suffix


def _yourmt3_rows() -> Iterator[PublishedCheckpoint]:
    """Five files of the Space mimbres/YourMT3; other projects pin the same commit, hashes and sizes."""
    for name, directory, file, sha256, size in _YOURMT3_FILES:
        constants = MODELS[name]
        yield PublishedCheckpoint(
            name=name,
            repository="mimbres/YourMT3",
            repository_type="space",
            revision="5e66c1ea173a8186e0d20432b841d3180cc015b5",
            filename=f"amt/logs/2024/{directory}/checkpoints/{file}",
            sha256=sha256,
            size=size,
            model=name,
            num_heads=constants.num_heads,
            max_length=constants.max_length,
            frontend=constants.frontend,
            mel_norm=False,
            position_base=256,
        )


_YOURMT3_FILES = (
    (
        "ymt3plus",
        "notask_all_cross_v6_xk2_amp0811_gm_ext_plus_nops_b72",
        "model.ckpt",
        "76673d4289aae1a66984b3fee59157d484cda8fdf9b56279251b137321d448e6",
        542_707_465,
    ),
    (
        "yptf-single",
        "ptf_all_cross_rebal5_mirst_xk2_edr005_attend_c_full_plus_b100",
        "model.ckpt",
        "507ff129bf68f65b3b3439368706fc413523fc729d994e4da2c3f50860b05dde",
        361_050_039,
    ),
    (
        "yptf-multi",
        "ptf_mc13_256_all_cross_v6_xk5_amp0811_edr005_attend_c_full_plus_2psn_nl26_sb_b26r_800k",
        "model.ckpt",
        "f7ed46a7c61244bd35485143a791b3cf46515ef96239793845ae8e4084865130",
        541_553_263,
    ),
    (
        "yptf-moe-multi",
        "mc13_256_g4_all_v7_mt3f_sqr_rms_moe_wf4_n8k2_silu_rope_rp_b36_nops",
        "last.ckpt",
        "ae38e415c79efd5592dcb9b658cdb99ddb11d4c4e1eaa364cab04a052473fc25",
        561_544_628,
    ),
    (
        "yptf-moe-multi-ps",
        "mc13_256_g4_all_v7_mt3f_sqr_rms_moe_wf4_n8k2_silu_rope_rp_b80_ps2",
        "model.ckpt",
        "7427055b51c3c8c86f6a35493cf0741d8db29186052055b59193590a82e6ec01",
        758_957_292,
    ),
)

_ROWS = (
    # Magenta's weights as converted by kunato/mt3-pytorch; the repository of MR-MT3 holds the same file. Other
    # projects pin this commit together with this hash; it was not compared with the hub itself.
    PublishedCheckpoint(
        name="mt3",
        repository="gudgud1014/MR-MT3",
        repository_type="model",
        revision="539c08b0fe551076db6108a5f5b2a57d774881ed",
        filename="mt3.pth",
        sha256="b8a3807ed265059abd25ad7f68142c06c35e8f6144dcaa45bd55946a3745398f",
        size=183_672_643,
        model="mt3",
        num_heads=6,
        max_length=1024,
        frontend="ddsp",
        mel_norm=False,
        position_base=255,
    ),
    *_yourmt3_rows(),
)

# The files that MR-MT3 names (gudgud96/MR-MT3 `test.sh`), and the vectors of memory each was trained with, which
# nothing inside says. Neither where they lie nor their hashes are known, so that they are no rows of the table: they
# cannot be fetched, only recognised by name.
MEMORY_LENGTHS: Mapping[str, int] = MappingProxyType(
    {
        "exp_segmemV2_prev_context=0.ckpt": 0,
        "exp_segmemV2_prev_context=32.ckpt": 32,
        "exp_segmemV2_prev_context=64.ckpt": 64,
        "exp_segmemV2_prev_context=64_prevaug_frame=3.ckpt": 64,
        "exp_segmemV2_prev_context=64_prevaug_frame=8.ckpt": 64,
    }
)

PUBLISHED: Mapping[str, PublishedCheckpoint] = MappingProxyType({row.name: row for row in _ROWS})


def find_published(name: str, table: Mapping[str, PublishedCheckpoint] = PUBLISHED) -> PublishedCheckpoint:
    """The row called `name`.

    Raises:
        CheckpointError: no row has that name.
    """
    if name not in table:
        raise CheckpointError(f"no published checkpoint is called {name!r}: use one of {', '.join(table)}")
    return table[name]


def recognise(sha256: str) -> PublishedCheckpoint | None:
    """The row whose file has this hash, if any."""
    return next((row for row in PUBLISHED.values() if row.sha256 == sha256), None)
