"""Names of the source formats that `mmalign data import` reads. Listing them imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.registry import Registry

if TYPE_CHECKING:
    from mmalign.data.formats.base import Reader

FORMATS: Registry[type[Reader]] = Registry("source format")
FORMATS.add(
    "pickapic",
    "mmalign.data.formats.pickapic:PickapicReader",
    summary="Pick-a-Pic v1/v2 Parquet with both pictures inside",
    cite="arXiv:2305.01569",
)
FORMATS.add(
    "folder",
    "mmalign.data.formats.folder:FolderReader",
    summary="a folder with pairs.csv or pairs.jsonl (prompt, chosen, rejected) and the pictures",
)
for _name, _target, _summary, _cite in (
    ("hpdv2", "hpd:Hpdv2Reader", "HPDv2's train.json: pairs with human votes", "arXiv:2306.09341"),
    ("hpdv2_lists", "hpd:Hpdv2ListReader", "HPDv2's test.json: ranked lists", "arXiv:2306.09341"),
    ("hpdv3", "hpd:Hpdv3Reader", "HPDv3's pairs", "arXiv:2508.03789"),
    ("imagerewarddb", "imagereward:ImageRewardReader", "ImageRewardDB, and ImageReward's test.json: ranked lists",
     "arXiv:2304.05977"),
    ("richhf", "richhf:RichhfReader", "RichHF-18K's ratings, joined with Pick-a-Pic (--media)", "arXiv:2312.10240"),
    ("webdataset", "webdataset:WebdatasetReader", "tar shards of picture pairs", ""),
    ("ranked", "lists:RankedListReader", "ranked lists: prompt, candidates, scores", "arXiv:2410.18013"),
    ("imagefolder", "lists:ImageFolderReader", "metadata.csv or .jsonl with chosen_file_name, rejected_file_name", ""),
    ("imagescores", "lists:ImageScoresReader", "metadata.csv or .jsonl with file_name, prompt and scores", ""),
    ("trl", "dialogues:TrlReader", "TRL's preference sets with pictures or clips", ""),
    ("msswift", "dialogues:SwiftReader", "ms-swift JSON and JSONL: messages, rejected_response", ""),
    ("llamafactory", "dialogues:LlamaFactoryReader", "LLaMA-Factory's sharegpt preference files", ""),
    ("povid", "dialogues:PovidReader", "POVID: conversations, rejected_conversations", "arXiv:2402.11411"),
    ("llava", "dialogues:LlavaReader", "LLaVA and LLaVA-Video files: single answers", "arXiv:2410.02713"),
    ("rlhfv", "rlhf:RlhfvReader", "RLHF-V", "arXiv:2312.00849"),
    ("rlaifv", "rlhf:RlaifvReader", "RLAIF-V", "arXiv:2405.17220"),
    ("vlfeedback", "rlhf:VlfeedbackReader", "VLFeedback: rated answers", "arXiv:2312.10665"),
    ("mimic-cxr", "radiology:MimicCxrReader", "MIMIC-CXR's folders: studies with reports, DICOM or JPEG", "arXiv:1901.07042"),
    ("chexpert", "radiology:ChexpertReader", "CheXpert's tables: reports of CheXpert Plus, or questions from labels",
     "arXiv:1901.07031"),
    ("temple", "temple:TempleReader", "TEMPLE's captions of clips and treated clips", "arXiv:2503.16929"),
):  # fmt: skip
    FORMATS.add(_name, f"mmalign.data.formats.{_target}", summary=_summary, cite=_cite)
