"""Align a model that reports on radiographs with a judge's preferences (CheXalign, arXiv:2410.07025). NOT A MEDICAL DEVICE.

accelerate launch scripts/train_cxr_dpo.py --config configs/cxr_dpo/qwen25vl_7b_mimic.yaml
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script(method="cxr_dpo")
