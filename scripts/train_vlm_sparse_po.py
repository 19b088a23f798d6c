"""Align a vision-language model with learnt weights of tokens: SparsePO (arXiv:2410.05102).

accelerate launch scripts/train_vlm_sparse_po.py --config configs/vlm_sparse_po/qwen25vl_7b.yaml
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script(method="vlm_sparse_po")
