"""Train with PPD (arXiv:2501.06655): one text-to-image model for many people, on pairs with a user each.

accelerate launch scripts/train_personalized_dpo.py --config configs/personalized_dpo/sd15_pickapic.yaml
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script(method="personalized_dpo")
