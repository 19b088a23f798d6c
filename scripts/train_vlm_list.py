"""Align a vision-language model on ranked lists of answers: Tree-PO (arXiv:2410.12854), RankDPO, Plackett-Luce.

accelerate launch scripts/train_vlm_list.py --config configs/vlm_list/qwen25vl_7b_candidates.yaml
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script(method="vlm_list")
