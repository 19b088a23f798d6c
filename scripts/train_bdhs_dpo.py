"""Align a vision-language model with answers that it makes up half blind (BDHS-DPO, arXiv:2407.02477): offline, online or mixed.

accelerate launch scripts/train_bdhs_dpo.py --config configs/bdhs_dpo/llava16_7b_offline.yaml
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script(method="bdhs_dpo")
