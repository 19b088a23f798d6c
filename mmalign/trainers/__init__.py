"""One method per file: its settings, its step, its citation. The table of their names."""

from __future__ import annotations

from typing import Any

from mmalign.registry import Registry

METHODS: Registry[Any] = Registry("method")
METHODS.add(
    "diffusion_dpo", "mmalign.trainers.diffusion_dpo:DiffusionDPO",
    summary="direct preference optimisation of a denoiser on pairs of pictures", cite="arXiv:2311.12908",
)  # fmt: skip
METHODS.add(
    "diffusion_sft", "mmalign.trainers.diffusion_sft:DiffusionSFT",
    summary="plain fine-tuning on the preferred pictures: the control of every comparison", cite="arXiv:2311.12908 section 5",
)  # fmt: skip
METHODS.add(
    "ddim_inpo", "mmalign.trainers.ddim_inpo:DDIMInPO",
    summary="Diffusion-DPO on noise found by DDIM inversion of each picture", cite="arXiv:2503.18454",
)  # fmt: skip
METHODS.add(
    "smpo", "mmalign.trainers.smpo:SmPO",
    summary="Diffusion-DPO with labels smoothed by a reward, on inverted noise", cite="arXiv:2506.02698",
)  # fmt: skip
METHODS.add(
    "diffusion_kto", "mmalign.trainers.diffusion_kto:DiffusionKTO",
    summary="pictures liked or disliked one by one", cite="arXiv:2404.04465",
)  # fmt: skip
METHODS.add(
    "mapo", "mmalign.trainers.mapo:MaPO",
    summary="denoising loss plus a margin of odds, without a reference", cite="arXiv:2406.06424",
)  # fmt: skip
METHODS.add(
    "diffusion_orpo", "mmalign.trainers.diffusion_orpo:DiffusionORPO",
    summary="denoising loss plus an error ratio, without a reference", cite="arXiv:2403.07691",
)  # fmt: skip
METHODS.add(
    "linear_dpo", "mmalign.trainers.linear_dpo:LinearDPO",
    summary="DPO with a clipped line in place of the sigmoid", cite="arXiv:2605.21123",
)  # fmt: skip
METHODS.add(
    "dspo", "mmalign.trainers.dspo:DSPO",
    summary="score matching of the chosen picture, bent away from the reference", cite="huaishengzhu/DSPO",
)  # fmt: skip
METHODS.add(
    "rank_dpo", "mmalign.trainers.rank_dpo:RankDPO",
    summary="every pair of a ranked list of pictures, weighted by gain and rank", cite="arXiv:2410.18013",
)  # fmt: skip
METHODS.add(
    "plackett_luce", "mmalign.trainers.plackett_luce:PlackettLuce",
    summary="the likelihood of a whole ranked list of pictures (Diffusion-LPO)", cite="arXiv:2510.01540",
)  # fmt: skip
METHODS.add(
    "personalized_dpo", "mmalign.trainers.personalized_dpo:PersonalizedDPO",
    summary="PPD: Diffusion-DPO for many users at once, with an attention of their own", cite="arXiv:2501.06655",
)  # fmt: skip
METHODS.add(
    "vlm_dpo", "mmalign.trainers.vlm_dpo:VlmDPO",
    summary="direct alignment on pairs of answers about pictures or clips: DPO and its relatives", cite="arXiv:2305.18290",
)  # fmt: skip
METHODS.add(
    "vlm_online_dpo", "mmalign.trainers.vlm_online_dpo:VlmOnlineDPO",
    summary="DPO on answers of the current policy, ordered by a judge, alone or mixed with pairs", cite="arXiv:2407.02477",
)  # fmt: skip
METHODS.add(
    "bdhs_dpo", "mmalign.trainers.bdhs_dpo:BdhsDPO",
    summary="DPO against answers that the model makes up with most of the picture hidden", cite="arXiv:2407.02477 section 3.4",
)  # fmt: skip
METHODS.add(
    "vlm_kto", "mmalign.trainers.vlm_kto:VlmKTO",
    summary="answers about pictures or clips, liked or disliked one by one", cite="arXiv:2402.01306",
)  # fmt: skip
METHODS.add(
    "vlm_list", "mmalign.trainers.vlm_list:VlmList",
    summary="ranked lists of answers: Tree-PO, RankDPO, Plackett-Luce", cite="arXiv:2410.12854",
)  # fmt: skip
METHODS.add(
    "vlm_tpo", "mmalign.trainers.vlm_tpo:VlmTPO",
    summary="a preference without reference and the likelihood of a gold answer (Triple-PO)", cite="arXiv:2405.16681",
)  # fmt: skip
METHODS.add(
    "vlm_dove", "mmalign.trainers.vlm_dove:VlmDove",
    summary="preferences between whole conversations, instructions included", cite="arXiv:2404.00530",
)  # fmt: skip
METHODS.add(
    "vlm_sparse_po", "mmalign.trainers.vlm_sparse_po:VlmSparsePO",
    summary="DPO that learns how much each token counts and may drift", cite="arXiv:2410.05102",
)  # fmt: skip
METHODS.add(
    "vlm_sft", "mmalign.trainers.vlm_sft:VlmSFT",
    summary="plain fine-tuning on answers (of pairs: the chosen ones)", cite="arXiv:2304.08485",
)  # fmt: skip
METHODS.add(
    "cxr_dpo", "mmalign.trainers.cxr_dpo:CxrDPO",
    summary="reports on radiographs aligned by a judge that reads reference reports: DPO, LC-DPO, IPO, KTO, ORPO",
    cite="arXiv:2410.07025",
)  # fmt: skip
METHODS.add(
    "sft", "mmalign.trainers.vlm_sft:VlmSFT", summary="short name of vlm_sft", cite="arXiv:2304.08485",
)  # fmt: skip
METHODS.add(
    "temple", "mmalign.trainers.temple:Temple",
    summary="temporal preferences of a video model in stages from easy to hard, then fine-tuning", cite="arXiv:2503.16929",
)  # fmt: skip
METHODS.add(
    "freeze_as_guard", "mmalign.trainers.freeze_as_guard:FreezeAsGuard",
    summary="learn which tensors to freeze so that illegal fine-tuning comes out poor", cite="arXiv:2405.17472",
)  # fmt: skip
