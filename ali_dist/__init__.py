"""Distributed training of Adversarially Learned Inference (ALI, arXiv:1606.00704)."""
