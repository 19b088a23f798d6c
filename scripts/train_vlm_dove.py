"""Align a vision-language model on pairs of whole conversations: DOVE (arXiv:2404.00530).

accelerate launch scripts/train_vlm_dove.py --config configs/vlm_dove/qwen25vl_7b.yaml
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script(method="vlm_dove")
