"""The built-in rewards with their cards. Accuracies are quoted from the cited authors, never measured here."""

from __future__ import annotations

from mmalign.rewards.cards import Card
from mmalign.rewards.table import register_scorer

_VIT_H = {"backbone": "ViT-H/14 (LAION-2B)", "parameters_millions": 986.1, "max_text_tokens": 77}
_VIT_L = {"backbone": "ViT-L/14 (OpenAI)", "parameters_millions": 427.6, "max_text_tokens": 77}
_HPS = {"hpsv2.0": "human preference score v2.0", "hpsv2.1": "human preference score v2.1",
        "hpsv2": "the same as hpsv2.1; the older version is hpsv2.0"}  # fmt: skip
_IGNORES = "The prompt is ignored."


def _dual(name: str, factory: str, **fields: object) -> None:
    register_scorer(name, f"mmalign.rewards.dual:{factory}", card=Card(name=name, differentiable=True, **fields))  # type: ignore[arg-type]


def _register_embedded() -> None:
    for name, text in (
        ("tiny-clip", "the embedded reward for the shape world, trained on a simulated population's taste"),
        ("tiny-judge", "the embedded hold-out judge: another network, data and seed than tiny-clip"),
    ):
        _dual(name, "embedded", summary=text, formula="exp(logit_scale) * cos", nominal_range="about -30 to 60",
              preprocess="clip_hf:32", max_text_tokens=20, backbone="tiny CLIP, 32 pixels", weights_licence="Apache-2.0",
              notes="Only meaningful for 32-pixel pictures of the shape world.")  # fmt: skip


def _register_dual() -> None:
    openai = {"weights": "openai/clip-vit-large-patch14", "code_licence": "MIT", "cite": "arXiv:2104.08718",
              "weights_licence": "see the model's terms", "preprocess": "clip_hf:224", **_VIT_L}  # fmt: skip
    _dual("clipscore", "clipscore", summary="cosine of CLIP L/14 in percent, not below 0",
          formula="100 * max(0, cos)", nominal_range="[0, 100], usually 15 to 35", **openai,
          published={"Pick-a-Pic v2 test (ties removed, RE-N-Y/imscore)": "60.6", "HPDv2 (RE-N-Y/imscore)": "62.6"})  # fmt: skip
    _dual("clipscore-raw", "clipscore", summary="bare cosine of CLIP L/14", formula="cos",
          nominal_range="[-1, 1], usually 0.1 to 0.35", **openai)  # fmt: skip
    _dual("clipscore-hessel", "clipscore", summary="as the CLIPScore paper: 2.5 max(0, cos), captions prefixed",
          formula="2.5 * max(0, cos) with the prefix 'A photo depicts '", nominal_range="[0, 2.5], usually 0.4 to 0.9",
          **openai)  # fmt: skip
    _dual("clipscore-logits", "clipscore", summary="CLIP L/14 similarity logit", formula="exp(logit_scale) * cos",
          nominal_range="usually 10 to 35", **openai)  # fmt: skip
    _dual("clipscore-h", "clipscore", summary="cosine of LAION CLIP H/14 in percent, not below 0",
          formula="100 * max(0, cos)", nominal_range="[0, 100], usually 15 to 40", code_licence="MIT",
          weights="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", weights_licence="MIT", preprocess="clip_hf:224", **_VIT_H)  # fmt: skip
    _dual("pickscore", "pickscore", summary="human preference, trained on Pick-a-Pic v1", formula="exp(logit_scale) * cos",
          nominal_range="usually 16 to 26", weights="yuvalkirstain/PickScore_v1", code_licence="MIT",
          preprocess="clip_hf:224", cite="arXiv:2305.01569", **_VIT_H,
          published={"Pick-a-Pic v2 test (ties removed, RE-N-Y/imscore)": "80.2", "HPDv2 (tgxs002/HPSv2)": "79.8"},
          notes="Its own paper counts ties by a probability threshold chosen on validation data.")  # fmt: skip
    for name, file, scores, accuracy in (
        ("hpsv2.0", "HPS_v2_compressed.pt", "0.23 to 0.29", "83.3"),
        ("hpsv2.1", "HPS_v2.1_compressed.pt", "0.13 to 0.34", "84.1"),
        ("hpsv2", "HPS_v2.1_compressed.pt", "0.13 to 0.34", "84.1"),
    ):
        _dual(name, "hps", summary=_HPS[name], formula="cos",
              nominal_range=f"model averages {scores}; often printed times 100", weights="xswu/HPSv2", weights_file=file,
              weights_licence="Apache-2.0", preprocess="hps_letterbox:224", cite="arXiv:2306.09341", **_VIT_H,
              published={"HPDv2 (tgxs002/HPSv2)": accuracy},
              notes="Versions are not comparable with each other, nor scores of different prompts.")  # fmt: skip


def _register_heads() -> None:
    hacked = "Linear in the embedding, so its gradient is constant and easy to exploit. " + _IGNORES
    shared = {"needs_prompt": False, "comparable_across_prompts": True, "differentiable": True, "notes": hacked,
              "preprocess": "clip_tv:224"}  # fmt: skip
    for name, backbone, weights in (
        ("aesthetic-v1-l14", _VIT_L, "openai/clip-vit-large-patch14"),
        (
            "aesthetic-v1-b32",
            {"backbone": "ViT-B/32 (OpenAI)", "parameters_millions": 151.3},
            "openai/clip-vit-base-patch32",
        ),
        (
            "aesthetic-v1-b16",
            {"backbone": "ViT-B/16 (OpenAI)", "parameters_millions": 149.6},
            "openai/clip-vit-base-patch16",
        ),
    ):
        register_scorer(name, "mmalign.rewards.aesthetic:aesthetic", card=Card(
            name=name, summary="LAION aesthetic predictor v1", formula="w . embedding + b", nominal_range="about 1 to 10",
            weights=weights, code_licence="MIT", cite="LAION-AI/aesthetic-predictor", **shared, **backbone))  # type: ignore[arg-type]  # fmt: skip
    register_scorer("aesthetic", "mmalign.rewards.aesthetic:aesthetic", card=Card(
        name="aesthetic", summary="LAION aesthetic predictor v2 (SAC + Logos + AVA1)", formula="w . embedding + b",
        nominal_range="usually 4 to 7, bounds [-12.8, 23.2]", weights="openai/clip-vit-large-patch14",
        cite="christophschuhmann/improved-aesthetic-predictor", published={"HPDv2 (tgxs002/HPSv2)": "76.8"},
        **shared, **_VIT_L))  # type: ignore[arg-type]  # fmt: skip
    register_scorer("imagereward", "mmalign.rewards.imagereward:imagereward", card=Card(
        name="imagereward", summary="human preference by a cross-encoder", nominal_range="usually -2 to 2",
        formula="(mlp(first text state after attending to the picture) - 0.1672) / 1.0333", weights="THUDM/ImageReward",
        weights_file="ImageReward.pt", weights_licence="Apache-2.0", backbone="BLIP-large", parameters_millions=446,
        max_text_tokens=35, preprocess="blip_224:224", differentiable=True, cite="arXiv:2304.05977",
        published={"ImageReward test (tgxs002/HPSv2)": "65.1", "HPDv2 (tgxs002/HPSv2)": "74.0"},
        notes="Prompts are cut at 35 tokens; scores are standardised, so negative ones are ordinary."))  # fmt: skip
    register_scorer("mps", "mmalign.rewards.mps:mps", card=Card(
        name="mps", summary="multi-dimensional preference score, overall model", differentiable=True,
        formula="exp(logit_scale) * cos(image feature attending to the prompt, text)", nominal_range="about 0 to 20",
        weights_licence="see Kwai-Kolors/MPS", code_licence="MIT", preprocess="clip_hf:224", cite="arXiv:2405.14705",
        published={"HPDv2 (Kwai-Kolors/MPS)": "83.5", "ImageReward test (Kwai-Kolors/MPS)": "67.5"},
        notes="The release is a pickled module: 'mmalign rewards convert' turns it into safetensors first.", **_VIT_H))  # type: ignore[arg-type]  # fmt: skip


def _register_personal() -> None:
    register_scorer("pal", "mmalign.rewards.pal.backend:pal", card=Card(
        name="pal", summary="what one person prefers, by a mixture of ideal points: pal:FOLDER, user given per row",
        formula="as its head says; see 'mmalign rewards verify pal --path FOLDER'", nominal_range="as its encoder's",
        differentiable=True, cite="arXiv:2406.08469",
        notes="'mmalign rewards fit-pal' makes the folder. pal:FOLDER#NAME scores every row for one user."))  # fmt: skip


def _register_simple() -> None:
    simple = {"needs_prompt": False, "comparable_across_prompts": True, "notes": _IGNORES}
    for name, target, text, formula, span, smooth in (
        ("jpeg-size", "JpegSize", "size as JPEG", "kilobytes at quality 95", "> 0", False),
        ("jpeg-compressible", "JpegSize", "smallness as JPEG", "minus kilobytes at quality 95", "< 0", False),
        ("brightness", "Brightness", "mean luma", "mean of 0.299 R + 0.587 G + 0.114 B", "[0, 1]", True),
        ("saturation", "Saturation", "mean colour saturation", "mean of (max - min) / max", "[0, 1]", True),
    ):
        register_scorer(name, f"mmalign.rewards.simple:{target}", card=Card(name=name, summary=text, formula=formula,
                        nominal_range=span, differentiable=smooth, **simple))  # type: ignore[arg-type]  # fmt: skip


def _register_judges() -> None:
    register_scorer("vqascore", "mmalign.rewards.judge:vqascore", card=Card(
        name="vqascore", summary="P(Yes) of any vision-language model: vqascore:<model>", nominal_range="(0, 1)",
        formula="P('Yes' | picture, question)", comparable_across_prompts=True, cite="arXiv:2404.01291",
        notes="The generic form; scores of different models are different rewards."))  # fmt: skip
    for size, millions in (("xl", 3154), ("xxl", 11440)):
        name = f"vqascore-flant5-{size}"
        register_scorer(name, "mmalign.rewards.clip_flant5:clip_flant5", card=Card(
            name=name, summary=f"VQAScore with its own network, CLIP-FlanT5 {size.upper()}", nominal_range="(0, 1)",
            formula="sqrt(P('Yes') P(end | 'Yes')) after the question", weights=f"zhiqiulin/clip-flant5-{size}",
            weights_licence="Apache-2.0", backbone="CLIP ViT-L/14-336 and Flan-T5", parameters_millions=millions,
            max_text_tokens=2048, preprocess="llava_pad336", comparable_across_prompts=True, cite="arXiv:2404.01291",
            notes="Needs transformers, and Flan-T5's tokenizer beside the weights (or tokenizer=)."))  # fmt: skip
    register_scorer("judge", "mmalign.rewards.judge:judge", card=Card(
        name="judge", summary="rating by any vision-language model: judge:<model>", nominal_range="[1, 5]",
        formula="mean rating under the model's probabilities of the rating tokens", cite="arXiv:2503.05236",
        notes="mode='text' parses a reply instead; an unreadable one is a missing score."))  # fmt: skip
    register_scorer("judge-api", "mmalign.rewards.api:judge_api", card=Card(
        name="judge-api", summary="rating by a model behind an OpenAI-compatible endpoint: judge-api:http://host:port/v1#model",
        formula="the rating in the reply", nominal_range="[1, 5]", cite="arXiv:2503.05236",
        notes="mode='expected' is the mean under the rating tokens' probabilities; an unreadable reply is missing."))  # fmt: skip
    register_scorer("remote", "mmalign.rewards.remote:remote", card=Card(
        name="remote", summary="a reward served elsewhere: remote:http://host:port#reward",
        formula="as the server's card says", nominal_range="as the server's card says"))  # fmt: skip


def _register_unavailable() -> None:
    for name, text, cite, reason in (
        ("hpsv3", "human preference score v3 (Qwen2-VL)", "arXiv:2508.03789",
         "its reference forward gives the language model other positions than transformers does, and without its weights "
         "no implementation could be checked against a published score"),
        ("visionreward-image", "VisionReward checklist", "arXiv:2412.21059",
         "its questions and weights could not be checked without the model"),
    ):  # fmt: skip
        register_scorer(name, "mmalign.rewards.judge:judge", card=Card(
            name=name, summary=text, formula="-", nominal_range="-", cite=cite, unavailable=reason))  # fmt: skip


_register_embedded()
_register_dual()
_register_heads()
_register_personal()
_register_simple()
_register_judges()
_register_unavailable()
