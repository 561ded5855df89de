"""Pretrained weights of other libraries."""
