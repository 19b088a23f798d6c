"""Temporal preference learning of a video model in stages, then fine-tuning: TEMPLE (arXiv:2503.16929).

accelerate launch scripts/train_temple.py --config configs/temple/qwen25vl_7b.yaml
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script(method="temple")
