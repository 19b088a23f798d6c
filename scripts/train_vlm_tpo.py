"""Align a vision-language model on pairs with a gold answer: Triple-PO (arXiv:2405.16681).

accelerate launch scripts/train_vlm_tpo.py --config configs/vlm_tpo/qwen25vl_7b.yaml
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script(method="vlm_tpo")
